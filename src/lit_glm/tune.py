"""`python -m lit_glm.tune [group=name] ...`: find the largest batch size that fits, and the fastest."""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from lit_glm.config.command_line import CommandLine
from lit_glm.config.hydra_main import run_command
from lit_glm.config.schema import TrainConfig
from lit_glm.config.tuned_values import TUNE_FILE
from lit_glm.errors import InputError

log = logging.getLogger("lit_glm.tune")

_OWN = ("bs", "hydra.run.dir", "run.resume")
"""Keys of a search that are not passed to its trials."""


@dataclass
class TuneOptions:
    """Options of `tune`: time limit, steps and repeats of the trials."""

    max_minutes: float = 60.0
    steps: int = 10
    repeats: int = 5


@dataclass
class TuneConfig(TrainConfig):
    """Configuration of `train` with the options of `tune`."""

    tune: TuneOptions = field(default_factory=TuneOptions)


def tune(config: Any, _composed: Any) -> int:
    """Run the search on this node; return the exit status."""
    from hydra.core.hydra_config import HydraConfig

    from lit_glm.hardware.env import set_hardware_env

    set_hardware_env(config.hardware)  # before anything imports torch

    from lit_glm.hardware.runtimes.selection import check_runtime_available
    from lit_glm.launch.signals import Interrupted
    from lit_glm.planning.workload import load_examples
    from lit_glm.runs.run_folder import lock_directory
    from lit_glm.tuning.coordinator import TrialRunner, run_coordinator, run_follower

    check_runtime_available(config.hardware, config.topology)
    line = CommandLine.read(sys.argv[1:])
    kept = [
        text
        for text, override in zip(line.overrides, line.parse())
        if override.key_or_group not in _OWN and not override.key_or_group.startswith("tune.")
    ]
    trials = TrialRunner(kept, list(line.flags), config.tune.steps)
    node = int(os.environ.get("NODE_RANK") or 0) if config.topology.num_nodes > 1 else 0
    folder = _resolve_search_dir(config, Path(str(HydraConfig.get().run.dir)))
    train, _, _ = load_examples(config)
    try:
        if node > 0:
            return run_follower(config, trials, folder)
        log.info(f"search folder {folder}")
        with lock_directory(folder):
            return run_coordinator(config, trials, folder, train)
    except Interrupted as stop:
        log.error(f"{stop}; resume with run.resume={folder}")
        return stop.exit_status


def _resolve_search_dir(config: TrainConfig, folder: Path) -> Path:
    """Return the folder of a new or resumed search.

    Raises:
        InputError: if the folder contains something else, or no search to resume.
    """
    from lit_glm.tuning.search_state import read_state, search_hash

    own, resume = search_hash(config), config.run.resume
    if resume == "auto":
        found = [place.parent for place in Path("outputs/tune").glob(f"*/*/{TUNE_FILE}")]
        mine = [
            place
            for place in found
            if (read_state(place) or {}).get("config_hash") == own and not (read_state(place) or {})["complete"]
        ]
        if not mine:
            log.info("run.resume=auto: no unfinished search of this configuration; starting a new one")
        newest: Optional[Path] = max(mine, key=lambda place: (place / TUNE_FILE).stat().st_mtime, default=None)
        return (newest or folder).resolve()
    if resume is not None:
        folder = Path(resume)
        if read_state(folder) is None:
            raise InputError(f"run.resume={resume}: is not a search folder (no {TUNE_FILE})")
    before = read_state(folder)
    if before is not None and before.get("config_hash") != own:
        raise InputError(f"{folder}: contains a search of another configuration; give another hydra.run.dir=")
    if before is None and folder.is_dir() and any(folder.iterdir()) and int(os.environ.get("NODE_RANK") or 0) == 0:
        raise InputError(f"{folder}: contains files that are not a search; give another hydra.run.dir=")
    return folder.resolve()


def main() -> int:
    """Run the command; return the exit status, 130 after Ctrl-C."""
    arguments = list(sys.argv)
    sys.argv = [argument for argument in arguments if not argument.startswith("bs=")]  # the search determines it
    try:
        return run_command("tune", TuneConfig, tune)
    except KeyboardInterrupt:
        return 130
    finally:
        sys.argv = arguments


if __name__ == "__main__":
    sys.exit(main())
