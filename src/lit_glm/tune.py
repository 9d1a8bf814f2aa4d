"""`python -m lit_glm.tune [group=name] ...`: the largest batch size that fits, and the fastest."""

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

_OWN = ("bs", "hydra.run.dir", "run.resume")
"""Keys of a search that its tries do not get."""


@dataclass
class TuneOptions:
    """How long a search may take."""

    max_minutes: float = 60.0
    steps: int = 10
    repeats: int = 5


@dataclass
class TuneConfig(TrainConfig):
    """The configuration of `train`, and how it is searched."""

    tune: TuneOptions = field(default_factory=TuneOptions)


def tune(config: Any, _composed: Any) -> int:
    """Search, and say what was found."""
    from hydra.core.hydra_config import HydraConfig

    from lit_glm.hardware.env import set_hardware_env

    set_hardware_env(config.hardware)  # before anything imports torch

    from lit_glm.hardware.runtimes.selection import check_runtime_available
    from lit_glm.launch.signals import Interrupted
    from lit_glm.planning.workload import load_examples
    from lit_glm.runs.lock import lock_directory
    from lit_glm.tuning.coordinator import run_coordinator, run_follower
    from lit_glm.tuning.trial_runner import TrialRunner

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
        print(f"lit_glm: search folder {folder}", flush=True)
        with lock_directory(folder):
            return run_coordinator(config, trials, folder, train)
    except Interrupted as stop:
        print(f"lit_glm: {stop}; resume with run.resume={folder}", file=sys.stderr)
        return stop.exit_status


def _resolve_search_dir(config: TrainConfig, folder: Path) -> Path:
    """Where the search is, or goes on.

    Raises:
        InputError: if there is something else, or nothing to go on with.
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
            print(
                "lit_glm: run.resume=auto: there is no unfinished search of this configuration: a new one", flush=True
            )
        newest: Optional[Path] = max(mine, key=lambda place: (place / TUNE_FILE).stat().st_mtime, default=None)
        return (newest or folder).resolve()
    if resume is not None:
        folder = Path(resume)
        if read_state(folder) is None:
            raise InputError(f"run.resume={resume}: is no folder of a search (it has no {TUNE_FILE})")
    before = read_state(folder)
    if before is not None and before.get("config_hash") != own:
        raise InputError(f"{folder}: holds a search under another configuration; give another hydra.run.dir=")
    if before is None and folder.is_dir() and any(folder.iterdir()) and int(os.environ.get("NODE_RANK") or 0) == 0:
        raise InputError(f"{folder}: holds something else; give another hydra.run.dir=")
    return folder.resolve()


def main() -> int:
    """Compose, search, say; 130 after Ctrl-C, with what is known so far on disk."""
    arguments = list(sys.argv)
    sys.argv = [argument for argument in arguments if not argument.startswith("bs=")]  # it is what is looked for
    try:
        return run_command("tune", TuneConfig, tune)
    except KeyboardInterrupt:
        return 130
    finally:
        sys.argv = arguments


if __name__ == "__main__":
    sys.exit(main())
