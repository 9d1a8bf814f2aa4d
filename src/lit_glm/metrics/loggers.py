"""Lightning loggers: created from the configuration, fed in the background; and the CSV logger of this project."""

import hashlib
import logging
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from omegaconf import OmegaConf
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

import lit_glm
from lit_glm.atomic_files import write_text
from lit_glm.config.schema import CONF_DIR, TrainConfig
from lit_glm.errors import InputError, exception_chain, first_line
from lit_glm.metrics.registry import METRICS
from lit_glm.metrics.run_metrics import RunMetrics
from lit_glm.metrics.timing import samples_per_second
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import config_fields
from lit_glm.runs.run_writer import AppendOnlyCSV
from lit_glm.training.module import StepMetrics

log = logging.getLogger(__name__)

_EVERY_STEPS = 10  # between points
_TRIES = 3
_PAUSE_S = 2.0
_REFUSED_CALLBACKS = {
    "EarlyStopping": "needs Lightning's validation loop, which a run has none of; run.target_accuracy ends a run",
    "GradientAccumulationScheduler": "is for automatic optimization; use optimizer.gradient_accumulation_steps",
    "StochasticWeightAveraging": "is for automatic optimization, and the training step here is the published one",
    "WeightAveraging": "is for automatic optimization, and the training step here is the published one",
    "BatchSizeFinder": "is for automatic optimization; use python -m lit_glm.tune",
    "LearningRateFinder": "is for automatic optimization; sweep over the learning rate: -m lr=1e-5,2e-5",
}
"""Callbacks of Lightning that would raise an error during or after training, and what to do instead."""
_WAIT_S = 20.0
"""Seconds to wait for unsent calls at the end of a run."""


class BackgroundLogger(Logger):
    """Logger that forwards calls in order from a background thread; a failing call is retried, then dropped."""

    def __init__(self, logger: Any, wait_s: float = _WAIT_S) -> None:
        super().__init__()
        self._logger, self._wait_s = logger, wait_s
        self._calls: queue.Queue[Callable[[], Any]] = queue.Queue()
        self._lost = 0
        threading.Thread(target=self._work, name="logger", daemon=True).start()

    @property
    def name(self) -> Optional[str]:
        """Class name of the wrapped logger."""
        return str(type(self._logger).__name__)

    @property
    def version(self) -> Any:
        """Version of the logger: a run has one."""
        return ""

    @property
    def experiment(self) -> Any:
        """Experiment object of the wrapped logger."""
        return self._logger.experiment

    def log_metrics(self, metrics: Any, step: Optional[int] = None) -> None:
        """Queue a `log_metrics` call."""
        self._calls.put(lambda: self._logger.log_metrics(metrics, step=step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Queue a `log_hyperparams` call."""
        self._calls.put(lambda: self._logger.log_hyperparams(params))

    def finalize(self, status: str) -> None:
        """Queue a `finalize` call."""
        self._calls.put(lambda: self._logger.finalize(status))

    def close(self) -> None:
        """Close the experiment, wait up to `wait_s` seconds for queued calls, and report calls that were not sent."""
        experiment = getattr(self._logger, "experiment", None)
        end = next((getattr(experiment, name, None) for name in ("finish", "close") if hasattr(experiment, name)), None)
        if callable(end):
            self._calls.put(end)
        limit = time.monotonic() + self._wait_s
        while self._calls.unfinished_tasks and time.monotonic() < limit:
            time.sleep(0.02)
        missing = self._lost + self._calls.unfinished_tasks
        if missing:
            text = f"curves are incomplete: {missing} calls were not sent"
            log.warning(f"{self.name}: {text}")

    def _work(self) -> None:
        while True:
            self._try(self._calls.get())
            self._calls.task_done()

    def _try(self, call: Callable[[], Any]) -> None:
        for number in range(1, _TRIES + 1):
            try:
                call()
                return
            except Exception as error:  # anything that a server, a network or a library may raise
                if self._lost == 0 and number == 1:
                    reason = first_line(error)
                    log.error(f"{self.name} failed ({reason}); the run continues")
                if number < _TRIES and self._lost == 0:  # wait only until the first lost call
                    time.sleep(_PAUSE_S)
        self._lost += 1


def hyperparameters(config: TrainConfig) -> Dict[str, Any]:
    """Return the hyperparameters that loggers receive, so that runs can be compared there."""
    names = ("bs", "lr", "seed", "hardware", "topology", "precision", "scoring", "model")
    known = config_fields(config)
    return {**{name: known[name] for name in names}, "version": lit_glm.__version__}


def run_name(config: TrainConfig) -> str:
    """Return the display name of a run in loggers."""
    return (
        f"{config.hardware.name} {config.topology.name} {config.precision.name} {config.scoring.name} "
        f"{config.model.name} {config.fix_hp} seed={config.seed}"
    )


def make_callbacks(config: TrainConfig) -> List[Any]:
    """Create the callbacks of the config group `callbacks`.

    Raises:
        InputError: if one cannot be created, or needs what this training does not have.
    """
    made = {name: _instantiate("callbacks", name, entry, {}) for name, entry in config.callbacks.items()}
    for name, callback in made.items():
        if not isinstance(callback, Callback):
            raise InputError(f"callbacks.{name}: {type(callback).__name__} is not a pytorch_lightning.Callback")
        for kind in type(callback).__mro__:
            if kind.__module__.startswith("pytorch_lightning") and kind.__name__ in _REFUSED_CALLBACKS:
                raise InputError(f"callbacks.{name}: {kind.__name__} {_REFUSED_CALLBACKS[kind.__name__]}")
    return list(made.values())


def make_loggers(job: JobSpec, run_dir: Path, steps_done: int) -> List[Any]:
    """Create the loggers of the config group `logger`; a resumed run continues their data.

    Raises:
        InputError: if one cannot be created.
    """
    made = []
    for name, entry in job.config.logger.items():
        defaults = _logger_arguments(str(entry.get("_target_", "")), job, run_dir, steps_done)
        missing = {key: value for key, value in defaults.items() if key not in entry}
        logger: Any = _instantiate("logger", name, entry, missing)
        if not isinstance(logger, Logger):
            raise InputError(f"logger.{name}: {type(logger).__name__} is not a pytorch_lightning.loggers.Logger")
        made.append(logger if isinstance(logger, ResumableCSVLogger) else BackgroundLogger(logger))
        if "MLFlow" in type(logger).__name__ and os.environ.get("RANK", "0") == "0":
            write_text(_mlflow_id(run_dir), str(logger.run_id))  # type: ignore[attr-defined]
    return made


def close_loggers(loggers: List[Any]) -> None:
    """Flush and close the loggers; a rank exits without running the interpreter's exit functions."""
    for logger in loggers:
        if isinstance(logger, BackgroundLogger):
            logger.close()


def _mlflow_id(run_dir: Path) -> Path:
    return run_dir / "mlflow_run"


def _logger_arguments(target: str, job: JobSpec, run_dir: Path, steps_done: int) -> Dict[str, Any]:
    """Return constructor arguments for a logger of a known type, in addition to those of its file."""
    place: Dict[str, Any] = {"save_dir": str(run_dir)}
    if target.endswith("ResumableCSVLogger"):
        return {**place, "keep_steps": steps_done if job.is_resume else None}
    if target.endswith("TensorBoardLogger"):
        # Points after the checkpoint are written again; purge_step makes the viewer drop the earlier ones.
        return {**place, "purge_step": steps_done + 1} if job.is_resume else place
    if target.endswith("WandbLogger"):
        own_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
        return {**place, "name": run_name(job.config), "id": own_id, "resume": "allow"}
    if target.endswith("MLFlowLogger"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # otherwise newer versions require a database server
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # default 7: 246 s per call
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        before = _mlflow_id(run_dir)
        is_continued = job.is_resume and before.is_file()
        store = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{Path(job.sweep_dir or run_dir).resolve()}/mlruns"
        run_id = before.read_text(encoding="utf-8").strip() if is_continued else None
        return {"tracking_uri": store, "run_name": run_name(job.config), "run_id": run_id}
    return place


def _instantiate(group: str, name: str, entry: Dict[str, Any], arguments: Dict[str, Any]) -> Any:
    from hydra.utils import instantiate

    try:
        # The arguments bypass OmegaConf, which would read `${` in the name of a folder as an interpolation.
        made = instantiate({**entry, "_partial_": True})(**arguments)
        if group == "logger":
            _ = made.experiment if hasattr(type(made), "experiment") else None  # fail now, not at first use
        return made
    except InputError:
        raise
    except Exception as error:  # missing package, invalid argument, unreachable server
        causes = exception_chain(error)
        reason, target = f"{type(causes[-1]).__name__}: {first_line(causes[-1])}", entry["_target_"]
        keys = ", ".join(key for key in {**arguments, **entry} if key != "_target_")
        advice = f"arguments: {keys or 'none'}; see conf/{group}/"
        if str(error).startswith("Error locating target"):
            advice = "its module must be importable: install its package, or add its folder to PYTHONPATH"
        elif (CONF_DIR / "logger" / f"{name}.yaml").is_file() and any(
            isinstance(cause, ImportError) for cause in causes
        ):
            advice = f"if a package is missing: pip install 'lit-glm[{name}]'"
        raise InputError(f"{group}.{name}: cannot be created ({target}: {reason}); {advice}") from error


class MetricLogging:
    """Sender of metrics to Lightning's loggers: train/loss, train/lr, train/grad_norm, perf/p_*, val/acc, mem/gib."""

    def __init__(self, run_metrics: RunMetrics) -> None:
        self._run_metrics = run_metrics
        self._evaluated_step = -1

    def begin(self, loggers: List[Any], evaluated_step: int) -> None:
        """Log the hyperparameters; `evaluated_step` is the last evaluation that an earlier part has logged, else -1."""
        for logger in loggers:
            logger.log_hyperparams(hyperparameters(self._run_metrics.config))
        self._evaluated_step = evaluated_step

    def step(self, loggers: List[Any], step: int, values: StepMetrics) -> None:
        """Log a point every few steps, and after each evaluation."""
        if not loggers or (step % _EVERY_STEPS and self._run_metrics.evaluated_step == self._evaluated_step):
            return
        seconds, samples = self._run_metrics.durations(), self._run_metrics.samples_here(step)
        memory = self._run_metrics.peak_memory()
        point = {
            "train/loss": values.loss,
            "train/lr": values.lr,
            "train/grad_norm": values.grad_norm,
            METRICS["p_core"].logged_as: samples_per_second(samples, seconds.pure_compute),
            METRICS["p_train"].logged_as: samples_per_second(samples, seconds.no_eval),
            METRICS["p_whole"].logged_as: samples_per_second(samples, seconds.raw_train),
            METRICS["mem_actual_gib"].logged_as: None if memory is None else memory / 2**30,
        }
        self.log(loggers, step, point)

    def log(self, loggers: List[Any], step: int, point: Dict[str, Optional[float]]) -> None:
        """Log a point, with the accuracy if there was an evaluation since the last one."""
        if self._run_metrics.evaluated_step != self._evaluated_step:
            self._evaluated_step = self._run_metrics.evaluated_step
            point[METRICS["acc"].logged_as] = self._run_metrics.accuracy
        known = {name: float(value) for name, value in point.items() if value is not None}
        for logger in loggers if known else []:
            logger.log_metrics(known, step=step)


CSV_COLUMNS = (
    *("step", "train/loss", "train/lr", "train/grad_norm"),
    *(METRICS[name].logged_as for name in ("p_core", "p_train", "p_whole", "acc", "mem_actual_gib")),
)


class ResumableCSVLogger(Logger):
    """Lightning logger that writes RUN_DIR/csv/metrics.csv and RUN_DIR/csv/hparams.yaml."""

    def __init__(self, save_dir: str, keep_steps: Optional[int] = None) -> None:
        """Set the folder, and the rows to keep.

        Args:
            save_dir: the run folder.
            keep_steps: rows up to this step are kept; None: start a new table.
        """
        super().__init__()
        self._folder, self._keep_steps = Path(save_dir) / "csv", keep_steps
        self._table: Optional[AppendOnlyCSV] = None

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of the logger: a run has one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write hparams.yaml."""
        self._folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(dict(params)), self._folder / "hparams.yaml")

    @rank_zero_only
    def log_metrics(self, metrics: Dict[str, float], step: Optional[int] = None) -> None:
        """Append a row to metrics.csv."""
        if self._table is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._table = AppendOnlyCSV(self._folder / "metrics.csv", CSV_COLUMNS, self._keep_steps)
        self._table.add(step=step, **{name: value for name, value in metrics.items() if name in CSV_COLUMNS})
