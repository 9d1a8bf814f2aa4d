"""torch_xmlir.xpu: devices. Memory functions are missing, as in several builds of the real one.

Two spellings of `synchronize` are in use; DOUBLE_SPELLING=xpu_synchronize takes the other one.
"""

import os
from types import SimpleNamespace

import torch

_current = [0]
CALLS = {"synchronize": 0, "empty_cache": 0}
"""How often."""


def is_available() -> bool:
    return True


def device_count() -> int:
    visible = os.environ.get("XPU_VISIBLE_DEVICES")
    return 8 if visible is None else len([index for index in visible.split(",") if index])


def current_device() -> int:
    return _current[0]


def set_device(index: int) -> None:
    if not 0 <= int(index) < device_count():
        raise RuntimeError(f"invalid XPU {index}: {device_count()} visible")
    _current[0] = int(index)


def synchronize() -> None:
    CALLS["synchronize"] += 1


if os.environ.get("DOUBLE_SPELLING") == "xpu_synchronize":
    xpu_synchronize = synchronize
    del synchronize


def get_device_properties(index: int) -> SimpleNamespace:
    return SimpleNamespace(name=get_device_name(index))  # without a memory size: the monitor has it


def empty_cache() -> None:
    CALLS["empty_cache"] += 1


def get_device_name(index: int) -> str:
    return f"double of an R300, card {index}"


def manual_seed_all(seed: int) -> None:
    torch.manual_seed(seed)
