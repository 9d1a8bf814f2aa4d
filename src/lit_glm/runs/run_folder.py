"""Acquisition and lock of a run folder. Files in it that this project has not written are never touched."""

import os
import platform
import re
import shutil
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from omegaconf import OmegaConf

from lit_glm.atomic_files import make_folder, try_lock, write_text
from lit_glm.config.schema import TrainConfig
from lit_glm.config.secrets import mask_config, mask_override, mask_overrides
from lit_glm.errors import InputError, RunError
from lit_glm.runs import job_spec as jobs
from lit_glm.runs.environment import ENVIRONMENT_FILE
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import (
    RESERVE_FILE,
    clear_error_files,
    is_complete,
    mark_failed,
    read_result,
    release_reserved_disk_space,
    reserve_disk_space,
    settle_status,
    write_error_file,
    write_initial_result,
)

_PROBE_S = 1.0  # `is_running` holds the lock for an instant
LOCK_FILE = ".lock"
"""Lock file in the folder; contains the PID and host of the process that locked it."""


@contextmanager
def lock_directory(folder: Path, advice: str = "wait until it exits, or give another hydra.run.dir=") -> Iterator[int]:
    """Lock a folder for this process, and for those that inherit the yielded descriptor.

    Args:
        folder: the folder; created if missing.
        advice: what to do if another process holds the lock, for the message.

    Raises:
        InputError: if another process holds the lock, or the folder is not writable.
    """
    make_folder(folder)
    try:
        descriptor = os.open(str(folder / LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); give another hydra.run.dir=") from error
    try:
        end, holder = time.monotonic() + _PROBE_S, os.read(descriptor, 200).decode(errors="replace")
        if holder and not re.fullmatch(r"\d+ on .*\n", holder):
            raise InputError(
                f"{folder}: contains a file {LOCK_FILE} that is not lit_glm's; give another hydra.run.dir="
            )
        while not try_lock(descriptor):
            if time.monotonic() > end:
                raise InputError(
                    f"{folder}: in use by another process{f' ({holder.strip()})' if holder else ''}; {advice}"
                )
            time.sleep(0.05)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} on {platform.node()}\n".encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds without its note
        yield descriptor
    finally:
        os.close(descriptor)


def is_running(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder; True if unknown, as in another user's folder."""
    try:
        is_read_only = os.statvfs(str(folder)).f_flag & os.ST_RDONLY
        descriptor = os.open(str(folder / LOCK_FILE), os.O_RDONLY if is_read_only else os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


_FILES = (
    "result.json", "steps.csv", "evals.csv", "memory.csv", "devices.csv", "perf.log", "mlperf.log", "mlflow_run",
    ENVIRONMENT_FILE,
)  # fmt: skip
_FOLDERS = {
    "checkpoints": ("step-*.ckpt", ".step-*.part"),
    "csv": ("metrics.csv", "hparams.yaml"),
    "tensorboard": ("events.out.tfevents.*", "hparams.yaml"),
    "mlruns": ("[0-9]*", ".trash", "models", "meta.yaml"),
    "wandb": ("run-*", "offline-run-*", "latest-run", "debug*.log"),
    "profile": ("trace.json", "kernels.md", "memory_snapshot.pickle", "*.csv", "*.json"),
    "errors": ("rank-*.txt", "killed-*.txt"),
    "ranks": ("[0-9]*",),
    ".hydra": ("config.yaml", "hydra.yaml", "overrides.yaml"),
}
"""Subfolders of a run with the patterns of its files there; any of them may be a symbolic link."""
_EVALUATION = ("evaluation", ("evaluation.json", "predictions.jsonl"))
"""What `evaluate` has added to a run."""
_PREVIOUS = ".previous-"
"""Prefix of the files of an overwritten run until the new run trains: until then its input may still be rejected."""
_NODES = "nodes"  # one folder per secondary node, which may start before node 0


def complete_result(run_dir: Path) -> Optional[Dict[str, Any]]:
    """Return the result of a complete run; None if the run has to be continued."""
    if not is_complete(run_dir):
        return None
    if not is_running(run_dir):
        settle_status(run_dir)  # a launcher that was killed has not written the status
    return read_result(run_dir)


def ensure_available(run_dir: Path, overwrite: bool, key: str = "hydra.run.dir") -> None:
    """Check that a new run may begin in a folder.

    Args:
        run_dir: the folder.
        overwrite: whether it may contain a run.
        key: the key that selects another folder, for messages.

    Raises:
        InputError: if it contains a run (unless that may be overwritten), or files that a run would overwrite or
            delete but did not create.
    """
    if (run_dir / jobs.JOB_FILE).is_file():
        if is_running(run_dir):
            raise InputError(f"{run_dir}: in use by another run; wait until it exits, or give another {key}=")
        if "config_hash" not in (jobs.read_job_json(run_dir) or {}):
            raise InputError(
                f"{run_dir}: contains a {jobs.JOB_FILE} that is damaged or not lit_glm's; give another {key}="
            )
        if not overwrite and not _failed_before_training(run_dir):
            status = (read_result(run_dir) or {}).get("status", "unknown")
            raise InputError(
                f"{run_dir}: already contains a run (status {status}); resume it with run.resume={run_dir}, replace it "
                f"with run.overwrite=true, or give another {key}="
            )
        return
    foreign = [name for name in (*_FILES, *_FOLDERS, RESERVE_FILE) if (run_dir / name).exists()]
    unknown = [path for path in (run_dir / _NODES).glob("*") if not path.name.isdigit()]
    foreign += [_NODES] if unknown else []
    if foreign:
        raise InputError(
            f"{run_dir}: is not a run folder (no {jobs.JOB_FILE}) but contains {', '.join(foreign)}, which a run would "
            f"overwrite; give another {key}="
        )


def _failed_before_training(run_dir: Path) -> bool:
    """Return whether a folder has no run, or one that was rejected or failed before anything was measured."""
    if not (run_dir / jobs.JOB_FILE).is_file():
        return True
    is_failed = (read_result(run_dir) or {}).get("status") == "failed"
    return is_failed and not (run_dir / "steps.csv").exists() and not (run_dir / "checkpoints").exists()


@contextmanager
def acquire_run_dir(job: JobSpec, run_dir: Path, config_files: Dict[str, str]) -> Iterator[int]:
    """Lock a run folder for the duration of a job, and write job.json there.

    Yields:
        The descriptor of the lock; processes that inherit it hold the lock too.

    Raises:
        InputError: if the folder is not available.
    """
    if not job.is_resume:
        ensure_available(run_dir, job.config.run.overwrite)
        _ensure_weights_are_elsewhere(run_dir, job.config)
    with lock_directory(run_dir) as lock, ExitStack() as keep:
        if not job.is_resume:
            # Again, since another process may have run there meanwhile; its lock has just been released.
            if not job.config.run.overwrite and not _failed_before_training(run_dir):
                raise InputError(
                    f"{run_dir}: another process has started a run in this folder; resume it with run.resume={run_dir}"
                )
            keep.enter_context(_replaced_run(run_dir))
        try:
            _prepare(job, run_dir, config_files)
        except OSError as error:
            failure = RunError(
                f"{run_dir}: the files of the run cannot be written ({error.strerror}); free disk space, or give "
                "another hydra.run.dir="
            )
            release_reserved_disk_space(run_dir)
            write_error_file(run_dir, 0, failure)
            mark_failed(run_dir, str(failure))
            raise failure from error
        try:
            yield lock
        finally:
            release_reserved_disk_space(run_dir)


def _prepare(job: JobSpec, run_dir: Path, config_files: Dict[str, str]) -> None:
    """Write what a run has from its start; job.json comes first and marks the folder as a run's."""
    clear_error_files(run_dir)
    job.write(run_dir)
    if not job.is_resume:
        write_initial_result(run_dir, job.config)
        (run_dir / ".hydra").mkdir(exist_ok=True)
        for name, text in config_files.items():
            write_text(run_dir / ".hydra" / name, text)
    reserve_disk_space(run_dir)


def _ensure_weights_are_elsewhere(run_dir: Path, config: TrainConfig) -> None:
    """Reject the weights of a run as initial weights of the run that is to replace it."""
    weights, own = config.model.init_checkpoint, run_dir.resolve()
    path = Path(weights or os.devnull).resolve()
    if (run_dir / jobs.JOB_FILE).is_file() and (path == own or own / "checkpoints" in (path, *path.parents)):
        raise InputError(
            f"model.init_checkpoint={weights}: is the run that this one would replace; give another hydra.run.dir="
        )


@contextmanager
def _replaced_run(run_dir: Path) -> Iterator[None]:
    """Set the files of an earlier run aside for the block; they come back if its input is rejected, else they go.

    Raises:
        InputError: if a file cannot be moved, because a new run would treat it as its own.
    """
    has_run = (run_dir / jobs.JOB_FILE).is_file()
    if has_run:
        discard_previous_run(run_dir)  # of a process that was killed
        try:
            for path in _files_of_run(run_dir):
                os.replace(path, path.with_name(f"{_PREVIOUS}{path.name}"))
        except OSError as error:
            raise InputError(f"run.overwrite=true: an earlier run cannot be replaced ({error})") from error
    try:
        yield
    except InputError:
        if has_run and any(run_dir.glob(f"{_PREVIOUS}*")):
            _delete(_files_of_run(run_dir))
            for path in _files_of_run(run_dir, _PREVIOUS):
                os.replace(path, path.with_name(path.name[len(_PREVIOUS) :]))
        raise
    finally:
        discard_previous_run(run_dir)


def _files_of_run(run_dir: Path, prefix: str = "") -> List[Path]:
    """Return the files and folders that a run has created, by name; all others are the user's."""
    paths = [run_dir / f"{prefix}{name}" for name in (jobs.JOB_FILE, *_FILES)]
    for name, patterns in (*_FOLDERS.items(), _EVALUATION):
        paths += [path for pattern in patterns for path in (run_dir / name).glob(f"{prefix}{pattern}")]
    paths = [path for path in dict.fromkeys(paths) if path.is_symlink() or path.exists()]
    return [path for path in paths if path.name.startswith(_PREVIOUS) == bool(prefix)]


def _delete(paths: List[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        else:
            path.unlink()


def discard_previous_run(run_dir: Path) -> None:
    """Delete what is left of an overwritten run, if any, with folders that are empty then."""
    paths = _files_of_run(run_dir, _PREVIOUS)
    if not paths:
        return
    _delete(paths)
    for name in (*_FOLDERS, _EVALUATION[0]):
        folder = run_dir / name
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def hydra_files(config: Any, hydra: Any, overrides: List[str]) -> Dict[str, str]:
    """Return the files of .hydra/ by name, as Hydra itself writes them, with secrets masked."""
    lines = "".join(f"- {mask_override(override)}\n" for override in overrides)
    return {"config.yaml": masked_yaml(config), "hydra.yaml": masked_yaml(hydra), "overrides.yaml": lines or "[]\n"}


def masked_yaml(config: Any) -> str:
    """Return a configuration as YAML with secrets masked, also in overrides that the `hydra` node stores as text."""

    def mask_texts(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: mask_texts(value) for key, value in node.items()}
        if isinstance(node, list):
            return [mask_texts(entry) for entry in node]
        return mask_overrides(node) if isinstance(node, str) else node

    plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    return OmegaConf.to_yaml(OmegaConf.create(mask_texts(mask_config(plain))))
