"""Discovery of earlier runs: the one to resume, and those of a configuration."""

import logging
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from hydra.core.hydra_config import HydraConfig

from lit_glm.config.schema import TrainConfig
from lit_glm.data.memmap_dataset import join_fingerprints, open_datasets
from lit_glm.errors import InputError
from lit_glm.runs.environment import environment_differences, local_environment, read_environment
from lit_glm.runs.job_spec import JOB_FILE, config_hash, ensure_same_config, read_job_json
from lit_glm.runs.result import is_complete, read_result
from lit_glm.runs.run_folder import ensure_available, is_running

log = logging.getLogger(__name__)

SearchPaths = Sequence[Tuple[Path, int]]
"""Folders, each with the number of levels below it at which run folders are searched."""


def find_run_dir(config: TrainConfig, run_dir: Path) -> Tuple[Path, bool]:
    """Return the run folder of a command, and whether its run is resumed.

    Raises:
        InputError: if a new run must not begin there.
    """
    is_dir_given = any(str(override).startswith("hydra.run.dir=") for override in HydraConfig.get().overrides.hydra)
    find = find_requeued_run if config.run.resume is None else resolve_resume
    folder = find(config, run_dir, is_dir_given)
    if folder is None:
        ensure_available(run_dir, config.run.overwrite)
        return run_dir.resolve(), False
    ensure_same_config(config, folder)
    return folder.resolve(), True


def resolve_resume(config: TrainConfig, run_dir: Path, is_dir_given: bool = False) -> Optional[Path]:
    """Return the run folder that `run.resume` refers to.

    Args:
        config: configuration of the command line.
        run_dir: folder for a new run.
        is_dir_given: whether the user gave that folder, in which case `auto` searches nowhere else.

    Returns:
        The folder, complete only if it was given; None if `auto` finds none, and a new run should start.

    Raises:
        InputError: if the folder is not a run folder.
    """
    if config.run.resume != "auto":
        folder = Path(str(config.run.resume))
        if not (folder / JOB_FILE).is_file():
            raise InputError(f"run.resume={config.run.resume}: is not a run folder (no {JOB_FILE})")
        return folder
    same = runs_by_config_hash(default_search_paths(run_dir, is_dir_given)).get(config_hash(config), [])
    # A complete run in a folder that the user gave is no error: a restarted pod repeats the command.
    complete = next((run for run in same if is_dir_given and is_complete(run)), None)
    unfinished = [run for run in same if not is_complete(run) and not is_running(run)]
    return max(unfinished, key=_job_mtime, default=complete)


def find_requeued_run(config: TrainConfig, run_dir: Path, is_dir_given: bool) -> Optional[Path]:
    """Return the run of this Slurm job if Slurm has requeued and restarted the job; else None."""
    if os.environ.get("SLURM_RESTART_COUNT", "0") in ("", "0"):
        return None
    runs = runs_by_config_hash(default_search_paths(run_dir, is_dir_given)).get(config_hash(config), [])
    runs_of_job = [run for run in runs if (read_job_json(run) or {}).get("slurm_job") == os.environ.get("SLURM_JOB_ID")]
    return max(runs_of_job, key=_job_mtime, default=None)


def best_run(runs: List[Path]) -> Optional[Path]:
    """Return the newest complete run, else the newest run."""
    return max([run for run in runs if is_complete(run)] or runs, key=_job_mtime, default=None)


def reusable_runs(runs: List[Path], config: TrainConfig, elsewhere: bool = False) -> List[Path]:
    """Return the runs that a sweep may reuse: of the same machine, software, data and weights; print the others.

    Args:
        runs: folders of runs with the same configuration.
        config: the configuration.
        elsewhere: whether jobs run on other machines, of which only the software is known here.
    """
    here: Dict[str, Any] = local_environment(config) if runs else {}
    here, reusable = {"packages": here.get("packages")} if elsewhere else here, []
    for run in runs:
        differences = environment_differences(read_environment(run), here)
        changed = None if differences else _changed_input(config, run)
        if differences:
            differing = "; ".join(f"{name} {there}, here {local}" for name, there, local in differences)
            log.info(f"sweep: {run} is not reused: it was measured on another machine ({differing})")
        elif changed is not None:
            log.info(f"sweep: {run} is not reused: {changed} has changed since it started")
        else:
            reusable.append(run)
    return reusable


def _changed_input(config: TrainConfig, run: Path) -> Optional[str]:
    """Return which input of a run has changed since it started; None: none. Only newer files are compared."""
    start, data = _job_mtime(run), config.data
    if max(_newest_mtime(data.train_file), _newest_mtime(data.eval_file)) > start:
        recorded = (read_result(run) or {}).get("data_fingerprint")
        try:
            same = recorded == join_fingerprints(open_datasets(data, config.model))
        except InputError:  # reported when the job starts
            same = False
        if not same:
            return f"{data.train_file} or {data.eval_file}"
    weights = config.model.init_checkpoint
    return f"model.init_checkpoint={weights}" if weights and _newest_mtime(weights) > start else None


def _newest_mtime(place: str) -> float:
    """Return when a file, or the newest file of weights in a folder, was last changed; 0.0 if there is none."""
    path = Path(place)
    files = [path] if path.is_file() else [file for kind in ("ckpt", "pt", "txt") for file in path.rglob(f"*.{kind}")]
    return max((file.stat().st_mtime for file in files), default=0.0)


def default_search_paths(run_dir: Path, is_dir_given: bool) -> SearchPaths:
    """Return where runs to resume are searched: a given folder alone, else also all of outputs/ and multirun/ here.

    Folders next to a given folder may belong to another user.
    """
    return [(run_dir, 0)] if is_dir_given else [(run_dir, 0), (Path("outputs"), 3), (Path("multirun"), 3)]


def runs_by_config_hash(places: SearchPaths) -> Dict[str, List[Path]]:
    """Group run folders by the hash of their configuration, as stored in job.json; no other file is read."""
    runs: Dict[str, List[Path]] = {}
    for folder in find_run_dirs(places):
        name = (read_job_json(folder) or {}).get("config_hash")
        if isinstance(name, str):
            runs.setdefault(name, []).append(folder)
    return runs


def find_run_dirs(places: SearchPaths) -> Iterator[Path]:
    """Yield each run folder below the search paths once."""
    visited = set()
    for place, depth in places:
        for root, folders, files in os.walk(str(place)):
            if JOB_FILE in files and os.path.realpath(root) not in visited:
                visited.add(os.path.realpath(root))
                yield Path(root)
            folders[:] = [name for name in folders if name != "nodes"]  # jobs of a run's secondary nodes
            if len(Path(root).relative_to(place).parts) >= depth or JOB_FILE in files:
                folders.clear()


def _job_mtime(folder: Path) -> float:
    return (folder / JOB_FILE).stat().st_mtime
