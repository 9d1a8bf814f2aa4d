"""A run folder is taken by one job, or refused: nothing in it that this project has not written is ever touched."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List

from lit_glm.atomic_files import write_text
from lit_glm.errors import InputError
from lit_glm.runs import job_spec as jobs
from lit_glm.runs.error_files import clear_errors
from lit_glm.runs.job_spec import Job
from lit_glm.runs.lock import alone_in, is_running
from lit_glm.runs.result import begin_result, give_room, keep_room, read_result

ENVIRONMENT = "environment.json"
_FILES = (
    "result.json", "steps.csv", "evals.csv", "memory.csv", "devices.csv", "perf.log", "mlperf.log", "mlflow_run",
    ENVIRONMENT,
)  # fmt: skip
_FOLDERS = ("checkpoints", "csv", "tensorboard", "mlruns", "wandb", "profile", "errors", "ranks", ".hydra")
"""What a run writes, besides job.json."""
_NODES = "nodes"  # a folder each for the jobs of further nodes, which may come first


def environment_of(run_dir: Path) -> Dict[str, Any]:
    """What a run was measured on; empty where it has not come so far."""
    try:
        content = json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_free(run_dir: Path, overwrite: bool) -> None:
    """Whether a new run may begin in a folder.

    Raises:
        InputError: if it holds a run (unless that may be overwritten), or names of somebody else's that a run would
            write or clear.
    """
    if (run_dir / jobs.FILE).is_file():
        if is_running(run_dir):
            raise InputError(f"{run_dir}: a run is at work here; wait for its end, or give another hydra.run.dir=")
        if not overwrite:
            status = (read_result(run_dir) or {}).get("status", "unknown")
            raise InputError(
                f"{run_dir}: holds a run already (status {status}); go on with it by run.resume={run_dir}, throw it "
                "away and begin anew by run.overwrite=true, or give another hydra.run.dir="
            )
        return
    foreign = [name for name in (*_FILES, *_FOLDERS) if (run_dir / name).exists()]
    others = [path for path in (run_dir / _NODES).glob("*") if not path.name.isdigit()]
    foreign += [_NODES] if others else []
    if foreign:
        raise InputError(
            f"{run_dir}: is no run folder of this program (it has no {jobs.FILE}), but holds {', '.join(foreign)}, "
            "which a run would write; give another hydra.run.dir="
        )


@contextmanager
def taken(job: Job, run_dir: Path, composed: Dict[str, str]) -> Iterator[int]:
    """Keep a folder for a job as long as that lasts, with job.json in it.

    Args:
        job: begins there, or goes on.
        run_dir: the folder.
        composed: names and contents of the files in .hydra/, written by a new run.

    Yields:
        The descriptor that keeps it; processes that inherit it keep the folder too.

    Raises:
        InputError: if the folder is not free.
    """
    if not job.resumes:
        check_free(run_dir, job.config.run.overwrite)
    with alone_in(run_dir) as lock:
        if not job.resumes:
            check_free_of_runs(run_dir, job)
            _clear(run_dir)
            begin_result(run_dir, job.config)
            (run_dir / ".hydra").mkdir(exist_ok=True)
            for name, text in composed.items():
                write_text(run_dir / ".hydra" / name, text)
        clear_errors(run_dir)
        job.write(run_dir)
        keep_room(run_dir)
        try:
            yield lock
        finally:
            give_room(run_dir)


def check_free_of_runs(run_dir: Path, job: Job) -> None:
    """Refuse what another process has begun and ended since the folder was looked at."""
    if (run_dir / jobs.FILE).is_file() and not job.config.run.overwrite:
        raise InputError(f"{run_dir}: another run has just been here; go on with it by run.resume={run_dir}")


def _clear(run_dir: Path) -> None:
    """Take away what an earlier run of this program has left, which may be overwritten."""
    if not (run_dir / jobs.FILE).is_file():
        return
    for name in _FILES:
        if (run_dir / name).exists():
            (run_dir / name).unlink()
    for name in _FOLDERS:
        shutil.rmtree(str(run_dir / name), ignore_errors=True)


def composed_files(config: str, hydra: str, overrides: List[str]) -> Dict[str, str]:
    """What .hydra/ holds, as Hydra itself names it.

    Args:
        config: the composed configuration as YAML.
        hydra: Hydra's own part of it.
        overrides: of the command line.
    """
    lines = "".join(f"- {override}\n" for override in overrides)
    return {"config.yaml": config, "hydra.yaml": hydra, "overrides.yaml": lines or "[]\n"}
