"""A sweep: each combination in a process of its own, what is done is not run again, one table over all of them.

Jobs may run anywhere (hydra's joblib and submitit launchers): each leaves a note in the sweep's folder, and whoever
started the sweep makes the table of these notes (`lit_glm.jobs.summary`).
"""

import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_glm.config.app import Outcome
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.files import write_json
from lit_glm.jobs.summary import NOTES, summarise
from lit_glm.runs import find
from lit_glm.runs.job import FILE, Job, check_same, identity
from lit_glm.runs.lock import is_running
from lit_glm.runs.result import COMPLETE, of_config, read_result
from lit_glm.runs.row import table


class SweepNotes(Callback):
    """Hydra calls it when a sweep starts, and after each job wherever that ran."""

    started: Optional[Path] = None
    """Folder of the sweep that this process has started."""
    total: Optional[int] = None
    """Its jobs, where they are known beforehand; a search's are not, and another process knows none."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Remember the folder; notes of an earlier start of the same sweep are renewed job by job."""
        SweepNotes.started = Path(config.hydra.sweep.dir).resolve()
        for note in (SweepNotes.started / NOTES).glob("*.json"):
            note.unlink()

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Note a job that was refused before it could leave a note itself."""
        if config.hydra.mode is None or config.hydra.mode.name == "RUN":
            return
        sweep_dir, number = Path(config.hydra.sweep.dir), int(config.hydra.job.num)
        if not _note_file(sweep_dir, number).exists():
            _note(sweep_dir, number, None, RunError.exit_status, _refused(config))  # its own process said the status


def _note_file(sweep_dir: Path, number: int) -> Path:
    return sweep_dir / NOTES / f"{number:05d}.json"


def _refused(config: Any) -> Dict[str, Any]:
    """What a row can say of a combination that was refused: its composed configuration may lack anything."""

    def text(key: str) -> str:
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException:
            return ""
        return "" if value is None else str(value)

    row: Dict[str, Any] = {name: text(f"{name}.name") for name in ("hardware", "precision", "scoring")}
    row["topology"] = "x".join(text(f"topology.{key}") for key in ("num_nodes", "devices_per_node"))
    return {**row, "fix_hp": f"bs={text('bs')},lr={text('lr')}", "status": "failed"}


def _note(sweep_dir: Path, number: int, run_dir: Optional[Path], status: int, row: Dict[str, Any], **more: Any) -> None:
    """Leave a note of a job, with the row of the table that it has without a result."""
    file = _note_file(sweep_dir, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    overrides = HydraConfig.get().job.override_dirname if HydraConfig.initialized() else ""
    folder = None if run_dir is None else str(run_dir.resolve())
    write_json(file, {"run_dir": folder, "exit_status": status, "overrides": overrides, "row": row, **more})


def run_combination(
    config: TrainConfig, run_dir: Path, files: Dict[str, str], prepare_data: Callable[[], None]
) -> Outcome:
    """Run one job of a sweep, or go on with it, or find it done.

    Args:
        config: the combination's.
        run_dir: where a new run goes.
        files: what .hydra/ is to hold.
        prepare_data: called before the job starts.

    Raises:
        KeyboardInterrupt: the job was stopped, and the rest of the sweep is not wanted either.
    """
    from lit_glm.jobs.interrupts import Interrupted

    hydra = HydraConfig.get()
    sweep_dir, status, result, folder = Path(hydra.sweep.dir), 1, None, run_dir
    of = "" if SweepNotes.total is None else f" of {SweepNotes.total}"
    changes = hydra.job.override_dirname or "the only combination"
    print(f"lit_glm: job {int(hydra.job.num) + 1}{of}: {changes}", flush=True)
    taken_from = ""
    try:
        earlier = _earlier(config, run_dir)
        folder = run_dir.resolve() if earlier is None else earlier.resolve()
        if earlier is None and (run_dir / FILE).exists() and config.sweep.skip_done:
            folder = run_dir.resolve().with_name(f"{run_dir.name}-{identity(config)}")  # the folder is another's
        taken_from = "" if earlier is None else str(folder)
        result = _run(config, folder, earlier is not None, sweep_dir, files, prepare_data)
        status = 0
    except (InputError, RunError) as error:
        print(f"lit_glm: {error}", file=sys.stderr)
        status = error.exit_status
    except Interrupted as stop:
        print(f"lit_glm: {stop}; start the same sweep again to go on", file=sys.stderr)
        status = stop.exit_status
        raise KeyboardInterrupt from None
    finally:
        row = {**of_config(config), "status": "failed"}
        told = {"taken_from": taken_from, "objective": config.sweep.objective}
        _note(sweep_dir, int(hydra.job.num), folder, status, row, **told)
    value = (result or {}).get(config.sweep.objective)
    return Outcome(status, None if value is None else float(value))


def _run(
    config: TrainConfig,
    folder: Path,
    goes_on: bool,
    sweep_dir: Path,
    files: Dict[str, str],
    prepare_data: Callable[[], None],
) -> Dict[str, Any]:
    """The result of a combination, run if it is not there."""
    from lit_glm.jobs.launch import run_job
    from lit_glm.runs.folder import check_free

    result = read_result(folder) if goes_on else None
    if result is not None and result.get("status") in COMPLETE:
        print(f"lit_glm: {folder}: the run is complete, there is nothing to do")
        print(table([result]), flush=True)
        return result
    if goes_on and is_running(folder):
        raise RunError(
            f"{folder}: another process is at work on this combination, which is left to it; start the same sweep "
            "again when it has ended: what is complete then is not run again"
        )
    if not goes_on:
        check_free(folder, config.run.overwrite)
    prepare_data()
    job = Job(config, time.monotonic(), sys.argv, goes_on, str(sweep_dir.resolve()))
    return run_job(job, folder, files, in_process=False)


def places(sweep_dir: Path, given: bool) -> find.Places:
    """Where earlier runs of a sweep's combinations are: in its own folder if that was named, else in all sweeps'."""
    return [(sweep_dir, 3)] if given else [(Path("multirun"), 4)]


def _earlier(config: TrainConfig, run_dir: Path) -> Optional[Path]:
    """The run of the same configuration that a sweep left before, or that `run.resume` names."""
    if config.run.resume is not None:
        folder = find.resolve(config.run.resume, config, run_dir)
    elif config.sweep.skip_done:
        hydra = HydraConfig.get()
        given = any(str(override).startswith("hydra.sweep.dir=") for override in hydra.overrides.hydra)
        runs = find.by_identity(places(Path(hydra.sweep.dir), given)).get(identity(config), [])
        folder = find.best_of(runs)
    else:
        folder = None
    if folder is not None:
        check_same(config, folder)
    return folder


def finish() -> int:
    """Make the table of the sweep that this process has started, if it has; returns its exit status."""
    sweep_dir, SweepNotes.started = SweepNotes.started, None
    if sweep_dir is None:
        return 0
    text, status = summarise(sweep_dir)
    print(text)
    print(f"lit_glm: {sweep_dir}/sweep.md, sweep.csv")
    return status
