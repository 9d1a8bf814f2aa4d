"""Environment variables of a chip. Nothing here imports torch: a runtime may read them when torch is imported."""

import os
from typing import List

from lit_glm.config.schema import HardwareConfig
from lit_glm.config.secrets import MASK


def set_hardware_env(hardware: HardwareConfig) -> List[str]:
    """Set the variables of a hardware file, before its runtime is imported and never over the user's.

    Returns:
        A line for each that was left as it was.
    """
    kept = []
    for name, value in hardware.env.items():
        if value == MASK:  # of a run folder; ranks have the value in their environment
            continue
        if os.environ.get(name, value) != value:
            kept.append(f"{name}={os.environ[name]} is set and stays; conf/hardware/{hardware.name}.yaml has {value}")
        os.environ.setdefault(name, value)
    return kept
