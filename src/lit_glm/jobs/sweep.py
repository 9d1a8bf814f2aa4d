"""A sweep: each combination in a process of its own, what is done is not run again, one table over all of them.

Jobs may run anywhere (hydra's joblib and submitit launchers): each leaves a note in the sweep's folder, and whoever
started the sweep makes the table of these notes.
"""

import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_glm.bench.result import COLUMNS, COMPLETE, cells, of_config, read_result, table, write_json
from lit_glm.config.app import Outcome
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.jobs.resume import check_same, runs_of
from lit_glm.jobs.spec import FILE, Job, identity

_NOTES = "jobs"


class SweepNotes(Callback):
    """Hydra calls it when a sweep starts, and after each job wherever that ran."""

    started: Optional[Path] = None
    """Folder of the sweep that this process has started."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Remember the folder; notes of an earlier start of the same sweep are renewed job by job."""
        SweepNotes.started = Path(config.hydra.sweep.dir).resolve()
        for note in (SweepNotes.started / _NOTES).glob("*.json"):
            note.unlink()

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Note a job that was refused before it could leave a note itself."""
        if config.hydra.mode is None or config.hydra.mode.name == "RUN":
            return
        sweep_dir, number = Path(config.hydra.sweep.dir), int(config.hydra.job.num)
        if not _note_file(sweep_dir, number).exists():
            _note(sweep_dir, number, None, RunError.exit_status, _refused(config))  # its own process said the status


def _note_file(sweep_dir: Path, number: int) -> Path:
    return sweep_dir / _NOTES / f"{number:05d}.json"


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


def _note(sweep_dir: Path, number: int, run_dir: Optional[Path], status: int, row: Dict[str, Any]) -> None:
    """Leave a note of a job, with the row of the table that it has without a result."""
    from hydra.core.hydra_config import HydraConfig

    file = _note_file(sweep_dir, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    overrides = HydraConfig.get().job.override_dirname if HydraConfig.initialized() else ""
    folder = None if run_dir is None else str(run_dir.resolve())
    write_json(file, {"run_dir": folder, "exit_status": status, "overrides": overrides, "row": row})


def run_combination(
    config: TrainConfig, run_dir: Path, sweep_dir: Path, number: int, prepare_data: Callable[[], None]
) -> Outcome:
    """Run one job of a sweep, or go on with it, or find it done.

    Args:
        config: the combination's.
        run_dir: where a new run goes.
        sweep_dir: where the note goes.
        number: of the job in the sweep.
        prepare_data: called before the job starts.

    Raises:
        KeyboardInterrupt: the job was stopped, and the rest of the sweep is not wanted either.
    """
    from lit_glm.jobs.interrupts import Interrupted
    from lit_glm.jobs.launch import run_job

    folder = earlier_run(config, run_dir) if config.sweep.skip_done else None
    if folder is not None:
        check_same(config, folder)
        run_dir = folder.resolve()
    elif (run_dir / FILE).exists() and config.sweep.skip_done:
        run_dir = run_dir.with_name(f"{run_dir.name}-{identity(config)}")  # the folder is another combination's
    elif (run_dir / FILE).exists():
        print(f"lit_glm: {run_dir} held another run, which is overwritten", file=sys.stderr)
    result = read_result(run_dir) if folder is not None else None
    status = 1
    try:
        if result is not None and result.get("status") in COMPLETE:
            print(f"lit_glm: {run_dir}: the run is complete, there is nothing to do")
            print(table([result]), flush=True)
        else:
            prepare_data()
            result = run_job(
                Job(config, time.monotonic(), sys.argv, folder is not None), run_dir.resolve(), in_process=False
            )
        status = 0
    except (InputError, RunError) as error:
        print(f"lit_glm: {error}", file=sys.stderr)
        status = error.exit_status
    except Interrupted as stop:
        print(f"lit_glm: {stop}; start the same sweep again to go on", file=sys.stderr)
        status = stop.exit_status
        raise KeyboardInterrupt from None
    except Exception as error:  # a full disk, say: the other combinations still have their turn, and the table is made
        print(f"lit_glm: {run_dir}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        _note(sweep_dir, number, run_dir, status, {**of_config(config), "status": "failed"})
    value = (result or {}).get(config.sweep.objective)
    return Outcome(status, math.nan if value is None else float(value))


def earlier_run(config: TrainConfig, run_dir: Path) -> Optional[Path]:
    """The run of the same configuration that a sweep left before: a complete one rather than an unfinished one."""
    runs = runs_of(identity(config), run_dir)
    complete = [folder for folder in runs if (read_result(folder) or {}).get("status") in COMPLETE]
    return max(complete or runs, key=lambda folder: folder.stat().st_mtime, default=None)


def summarise(sweep_dir: Path) -> "tuple[str, int]":
    """Write sweep.csv and sweep.md from the notes of the jobs, a row a job in the order of the sweep.

    Returns:
        The table for the terminal, and the exit status: the highest of any job.
    """
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((sweep_dir / _NOTES).glob("*.json"))]
    results = [_result(note) for note in notes]
    text = table(results)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    (sweep_dir / "sweep.md").write_text(text + "\n", encoding="utf-8")
    with (sweep_dir / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "scoring", "status", "run_dir", "overrides"])
        for note, result in zip(notes, results):
            writer.writerow(
                [*cells(result), result["scoring"], result["status"], note["run_dir"] or "", note["overrides"]]
            )
    return text, max([int(note["exit_status"]) for note in notes], default=0)


def _result(note: Dict[str, Any]) -> Dict[str, Any]:
    own: Dict[str, Any] = note["row"]
    if note["run_dir"] is None or note["exit_status"] == InputError.exit_status:
        return own  # what the folder holds is an earlier run's
    return read_result(Path(note["run_dir"])) or own


def finish() -> int:
    """Make the table of the sweep that this process has started, if it has; returns its exit status."""
    sweep_dir, SweepNotes.started = SweepNotes.started, None
    if sweep_dir is None:
        return 0
    text, status = summarise(sweep_dir)
    print(text)
    print(f"lit_glm: {sweep_dir}/sweep.md, sweep.csv")
    return status
