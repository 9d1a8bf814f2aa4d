"""Where earlier runs are: the one that should go on, and those of a configuration."""

import os
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.runs.job_spec import JOB_FILE, config_hash, read_job_json
from lit_glm.runs.lock import is_running
from lit_glm.runs.result import is_complete

SearchPaths = Sequence[Tuple[Path, int]]
"""Folders, and how many levels below each run folders are looked for."""


def resolve_resume(resume: str, config: TrainConfig, run_dir: Path, given: bool = False) -> Optional[Path]:
    """The run folder that `run.resume` means.

    Args:
        resume: a run folder, or auto.
        config: of the command line.
        run_dir: where a new run would go.
        given: whether the user has named that folder: then `auto` looks nowhere else.

    Returns:
        The folder; None if `auto` finds none, and a new run is to be started.

    Raises:
        InputError: if the folder is no run folder.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / JOB_FILE).is_file():
            raise InputError(f"run.resume={resume}: is no run folder (it has no {JOB_FILE})")
        return folder
    return newest_unfinished(runs_by_config_hash(default_search_paths(run_dir, given)).get(config_hash(config), []))


def find_requeued_run(config: TrainConfig, run_dir: Path, given: bool) -> Optional[Path]:
    """The run of this very Slurm job, if Slurm has put it back into the queue and started it again."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") in ("", "0"):
        return None
    runs = runs_by_config_hash(default_search_paths(run_dir, given)).get(config_hash(config), [])
    own = [run for run in runs if (read_job_json(run) or {}).get("slurm_job") == os.environ.get("SLURM_JOB_ID")]
    return max(own, key=_job_mtime, default=None)


def newest_unfinished(runs: List[Path]) -> Optional[Path]:
    """The newest of some runs that is neither complete nor being worked at."""
    return max((run for run in runs if not is_complete(run) and not is_running(run)), key=_job_mtime, default=None)


def best_run(runs: List[Path]) -> Optional[Path]:
    """The newest complete run of a configuration, else the newest."""
    return max([run for run in runs if is_complete(run)] or runs, key=_job_mtime, default=None)


def default_search_paths(run_dir: Path, given: bool) -> SearchPaths:
    """Where runs are that may be resumed: the folder that was given, else all below outputs/ and multirun/ here.

    What lies beside a folder that was given may be somebody else's.
    """
    return [(run_dir, 0)] if given else [(run_dir, 0), (Path("outputs"), 3), (Path("multirun"), 3)]


def runs_by_config_hash(places: SearchPaths) -> Dict[str, List[Path]]:
    """Run folders by the name of their configuration. Reads one small file a folder, and compares nothing else."""
    found: Dict[str, List[Path]] = {}
    for folder in find_run_dirs(places):
        name = (read_job_json(folder) or {}).get("config_hash")
        if isinstance(name, str):
            found.setdefault(name, []).append(folder)
    return found


def find_run_dirs(places: SearchPaths) -> Iterator[Path]:
    """All run folders in some places, each once."""
    seen = set()
    for place, depth in places:
        for root, folders, files in os.walk(str(place)):
            if JOB_FILE in files and os.path.realpath(root) not in seen:
                seen.add(os.path.realpath(root))
                yield Path(root)
            folders[:] = [name for name in folders if name != "nodes"]  # jobs of a run's further nodes
            if len(Path(root).relative_to(place).parts) >= depth or JOB_FILE in files:
                folders.clear()


def _job_mtime(folder: Path) -> float:
    return (folder / JOB_FILE).stat().st_mtime
