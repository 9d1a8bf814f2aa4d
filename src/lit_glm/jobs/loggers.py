"""Loggers and callbacks of a configuration, made with what a run knows: its folder, its name, where it goes on."""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import lit_glm
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.files import write_text
from lit_glm.runs.job import Job
from lit_glm.runs.result import of_config


def hyperparameters(config: TrainConfig) -> Dict[str, Any]:
    """What loggers are told of a run, so that runs can be compared there."""
    names = ("bs", "lr", "seed", "hardware", "topology", "precision", "scoring", "model")
    known = of_config(config)
    return {**{name: known[name] for name in names}, "version": lit_glm.__version__}


def run_name(config: TrainConfig) -> str:
    """What a run is called where many are shown."""
    return (
        f"{config.hardware.name} {config.topology.name} {config.precision.name} {config.scoring.name} "
        f"{config.model.name} {config.fix_hp} seed={config.seed}"
    )


def make_callbacks(config: TrainConfig) -> List[Any]:
    """Those of the group `callbacks`.

    Raises:
        InputError: if one cannot be made.
    """
    return [_made("callbacks", name, entry) for name, entry in config.callbacks.items()]


def make_loggers(job: Job, run_dir: Path, steps_done: int) -> List[Any]:
    """Those of the group `logger`; a run that goes on continues what they have.

    Args:
        job: the run's.
        run_dir: where their files go.
        steps_done: steps that stand.

    Raises:
        InputError: if one cannot be made.
    """
    made = []
    for name, entry in job.config.logger.items():
        own = _own_arguments(str(entry.get("_target_", "")), job, run_dir, steps_done)
        logger = _made("logger", name, {**own, **entry})
        made.append(logger)
        if "MLFlow" in type(logger).__name__ and os.environ.get("RANK", "0") == "0":
            write_text(_mlflow_id(run_dir), str(logger.run_id))
    return made


def finish(loggers: List[Any]) -> None:
    """Have loggers complete their files: a rank ends without the interpreter's exit functions."""
    for logger in loggers:
        for name in ("finish", "close"):
            end = getattr(getattr(logger, "experiment", None), name, None)
            if callable(end):
                end()
                break


def _mlflow_id(run_dir: Path) -> Path:
    return run_dir / "mlflow_run"


def _own_arguments(target: str, job: Job, run_dir: Path, steps_done: int) -> Dict[str, Any]:
    """What a logger of a known kind is given beside what its file says."""
    place: Dict[str, Any] = {"save_dir": str(run_dir)}
    if target.endswith("CSVCurves"):
        return {**place, "keep_steps": steps_done if job.resumes else None}
    if target.endswith("TensorBoardLogger"):
        # Points behind the checkpoint are written again: the viewer is told to forget the first ones.
        return {**place, "purge_step": steps_done + 1} if job.resumes else place
    if target.endswith("WandbLogger"):
        return {**place, "name": run_name(job.config), "id": _wandb_id(run_dir), "resume": "allow"}
    if target.endswith("MLFlowLogger"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones want a database server without it
        before = _mlflow_id(run_dir)
        goes_on = job.resumes and before.is_file()
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{Path(job.sweep_dir or run_dir).resolve()}/mlruns"
        run_id = before.read_text(encoding="utf-8").strip() if goes_on else None
        return {"tracking_uri": store, "run_name": run_name(job.config), "run_id": run_id}
    return place


def _wandb_id(run_dir: Path) -> str:
    import hashlib

    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]


def _made(group: str, name: str, entry: Dict[str, Any]) -> Any:
    from hydra.utils import instantiate

    if not isinstance(entry, dict) or not entry.get("_target_"):
        raise InputError(f"{group}.{name}: names no class (_target_); `{group}=NAME` takes a file of conf/{group}/")
    try:
        made = instantiate(entry)
        if group == "logger":
            _ = made.experiment if hasattr(type(made), "experiment") else None  # what it cannot do is said now
        return made
    except InputError:
        raise
    except Exception as error:  # a package that is missing, an argument too many, a server out of reach
        cause: Optional[BaseException] = error
        while cause is not None and not isinstance(cause, ImportError):
            cause = cause.__cause__
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        if cause is not None:
            raise InputError(
                f"{group}.{name}: cannot be made ({reason}); its package may be missing: pip install 'lit-glm[{name}]'"
            ) from error
        given = ", ".join(key for key in entry if key != "_target_")
        raise InputError(
            f"{group}.{name}: {entry['_target_']} cannot be made ({reason}); it is given {given}; see conf/{group}/"
        ) from error
