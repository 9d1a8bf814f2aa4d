"""A sweep (Hydra multirun): one process per combination, completed combinations are skipped, one table over all.

Jobs may run anywhere (Hydra's joblib and submitit launchers): each writes a record into the sweep folder, and the
process that started the sweep builds sweep.md and sweep.csv from these records.
"""

import csv
import json
import logging
import os
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Optional, Tuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_glm.atomic_files import atomic_write, read_json, write_json, write_text
from lit_glm.compat import leave_out_jobs
from lit_glm.config.command_line import CommandLine
from lit_glm.config.hydra_main import TaskOutcome, find_user_folders, load_config, validate_config, without_hydra
from lit_glm.config.schema import TrainConfig
from lit_glm.config.secrets import mask_override, mask_overrides
from lit_glm.data.memmap_dataset import prepare_data
from lit_glm.errors import InputError, RunError, first_line
from lit_glm.launch.rendezvous import Node
from lit_glm.launch.signals import Interrupted, call_before_stop
from lit_glm.launch.sweep_processes import (
    JobProcesses,
    install_worker_handlers,
    is_joblib,
    record_worker_stop,
    worker_stop_signal,
)
from lit_glm.metrics.registry import METRICS, OBJECTIVES, PUBLISHED_COLUMNS
from lit_glm.runs import discovery
from lit_glm.runs.job_spec import JOB_FILE, JobSpec, config_hash, ensure_same_config
from lit_glm.runs.result import (
    COMPLETE,
    config_fields,
    is_complete,
    read_result,
    results_table,
    table_cells,
)
from lit_glm.runs.run_folder import (
    LOCK_FILE,
    complete_result,
    ensure_available,
    is_running,
    lock_directory,
    masked_yaml,
)

log = logging.getLogger(__name__)

JOB_RECORDS_DIR = "jobs"
"""Subfolder with the job records, by which a sweep folder is recognised."""
CompleteRun = Tuple[Path, List[str], TrainConfig]
"""Run folder, overrides and configuration of a complete combination."""


def summarise_sweep(sweep_dir: Path) -> Tuple[str, int]:
    """Write sweep.csv and sweep.md from the job records, best run first by the sweep's objective.

    Returns:
        The table for the terminal with one line per run below it, and the highest exit status of any job.
    """
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((sweep_dir / JOB_RECORDS_DIR).glob("*.json"))
    ]
    objective = next((str(record["objective"]) for record in records if record.get("objective")), "")
    status = max([int(record["exit_status"]) for record in records], default=0)
    # A search may suggest a combination again, whose run is then reused: one row.
    by_run: Dict[Any, Dict[str, Any]] = {}
    for number, record in enumerate(records):
        is_done = record["run_dir"] and not record["exit_status"]
        by_run.setdefault((record["run_dir"], *record["overrides"]) if is_done else number, record)
    pairs = [(record, _job_result(record, sweep_dir)) for record in by_run.values()]
    if objective in METRICS:
        sort_key = METRICS[objective].sort_key
        pairs.sort(key=lambda pair: sort_key(_ranked_value(pair[1], objective), pair[1].get("converged")))
    records, results = [record for record, _ in pairs], [result for _, result in pairs]
    text = results_table(results)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    write_text(sweep_dir / "sweep.md", text + "\n")
    with atomic_write(sweep_dir / "sweep.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*PUBLISHED_COLUMNS, "scoring", "status", "run_dir", "overrides", "reused_from"])
        for record, result in pairs:
            more = [record["run_dir"] or "", ",".join(record["overrides"]), record.get("reused_from", "")]
            writer.writerow([*table_cells(result), result["scoring"], result["status"], *more])
    lines, common = [text], set(records[0]["overrides"]).intersection(*(record["overrides"] for record in records))
    for record in records:  # what all combinations have in common is not repeated
        record["label"] = " ".join(text for text in record["overrides"] if text not in common) or "the only combination"
    best = _ranked_value(results[0], objective)
    if best is not None:
        if len(results) > 1:
            lines += [_ranking_line(number, *pair, objective) for number, pair in enumerate(pairs, 1)]
        value = METRICS[objective].form(best)
        lines.append(f"lit_glm: best by {objective} ({value}): {records[0]['label']}, {records[0]['run_dir']}")
    lines += [
        f"lit_glm: failed: {record['label']}: {str(result['error']).splitlines()[0]}"
        for record, result in pairs
        if result.get("error") and result.get("status") not in COMPLETE
    ]
    return "\n".join(lines), status


def _ranked_value(result: Dict[str, Any], objective: str) -> Optional[float]:
    """Return the metric that is the sweep's objective; None unless the run is complete and has it."""
    is_ranked = objective in METRICS and result.get("status") in COMPLETE
    return METRICS[objective].value(result) if is_ranked else None


def _ranking_line(number: int, record: Dict[str, Any], result: Dict[str, Any], objective: str) -> str:
    value = _ranked_value(result, objective)
    text = str(result.get("status")) if value is None else METRICS[objective].form(value)
    return f"{number}. {text}  {record['label']}  {record['run_dir'] or ''}".rstrip()


def _job_result(record: Dict[str, Any], sweep_dir: Path) -> Dict[str, Any]:
    row: Dict[str, Any] = record["row"]
    if record["run_dir"] is None or record["exit_status"] == InputError.exit_status:
        return row  # the folder contains the result of an earlier run
    result = read_result(Path(record["run_dir"])) or row
    reused_from = record.get("reused_from")
    if not reused_from:
        return result
    inside = str(reused_from).startswith(f"{sweep_dir}/")
    return {**result, "reused_from": str(Path(reused_from).relative_to(sweep_dir)) if inside else reused_from}


class SweepCallback(Callback):
    """Hydra callback, called when a sweep starts and after each job, wherever it ran."""

    started: Optional[Path] = None
    """Folder of the sweep that this process started."""
    total: Optional[int] = None
    """Number of jobs of the sweep if known in advance; None for a search and in other processes."""
    complete: ClassVar[List[CompleteRun]] = []
    """Runs of complete combinations, which need no job."""
    processes: Optional[JobProcesses] = None
    """Processes of the jobs of the sweep that this process started."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Store the sweep folder, delete the job records of an earlier start, and write those of complete runs."""
        if not _keeps_records(config):
            return
        SweepCallback.started = Path(config.hydra.sweep.dir).resolve()
        processes = JobProcesses(str(config.hydra.launcher.get("_target_")), SweepCallback.started)
        shutdown_s = float(OmegaConf.select(config, "run.shutdown_timeout_s") or 0.0)
        call_before_stop(lambda number: processes.stop(number, shutdown_s))
        SweepCallback.processes = processes
        for record_file in filter(_is_job_record, (SweepCallback.started / JOB_RECORDS_DIR).glob("*.json")):
            record_file.unlink()
        for number, (run_dir, overrides, of_run) in enumerate(SweepCallback.complete, SweepCallback.total or 0):
            more = {"reused_from": str(run_dir.resolve()), "objective": of_run.sweep.objective}
            _write_job_record(SweepCallback.started, number, run_dir, 0, config_fields(of_run), overrides, **more)

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Write the record of a job that was rejected before it could write one itself."""
        if config.hydra.mode is None or config.hydra.mode.name == "RUN" or not _keeps_records(config):
            return
        sweep_dir, number = Path(config.hydra.sweep.dir), int(config.hydra.job.num)
        if not _job_record_file(sweep_dir, number).exists() and worker_stop_signal() is None:
            overrides = list(config.hydra.overrides.task)
            _write_job_record(sweep_dir, number, None, RunError.exit_status, _rejected_row(config), overrides)


def _keeps_records(config: Any) -> bool:
    """Return whether this process keeps records of jobs: those of `train` on node 0, not of `verify -m`."""
    return config.hydra.job.config_name == "train" and _is_first_node()


def _is_first_node() -> bool:
    """Return whether this is node 0, which alone writes to the sweep's folder."""
    return os.environ.get("NODE_RANK", "0") in ("", "0")


def _job_record_file(sweep_dir: Path, number: int) -> Path:
    return sweep_dir / JOB_RECORDS_DIR / f"{number:05d}.json"


def _is_job_record(file: Path) -> bool:
    is_named_so = file.suffix == ".json" and file.stem.isdigit()
    return is_named_so and {"run_dir", "exit_status", "overrides", "row"} <= set(read_json(file) or {})


def _rejected_row(config: Any) -> Dict[str, Any]:
    """Return the table row of a rejected combination, with the reason; any key of `config` may be missing."""

    def text(key: str) -> str:
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException:
            return ""
        return "" if value is None else str(value)

    row: Dict[str, Any] = {name: text(f"{name}.name") for name in ("hardware", "precision", "scoring")}
    row["topology"] = "x".join(text(f"topology.{key}") for key in ("num_nodes", "devices_per_node"))
    row.update(fix_hp=f"bs={text('bs')},lr={text('lr')}", status="failed")
    try:
        validate_config(without_hydra(config), TrainConfig, find_user_folders(config.hydra))
    except (InputError, OmegaConfBaseException) as error:
        row["error"] = first_line(error)
    return row


def _write_job_record(
    sweep_dir: Path,
    number: int,
    run_dir: Optional[Path],
    status: int,
    row: Dict[str, Any],
    overrides: List[str],
    **more: Any,
) -> None:
    """Write the record of a job, with its table row for the case that it has no result."""
    file = _job_record_file(sweep_dir, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    masked = sorted(map(mask_override, overrides))
    folder = None if run_dir is None else str(run_dir.resolve())
    write_json(file, {"run_dir": folder, "exit_status": status, "overrides": masked, "row": row, **more})


def run_sweep_job(
    config: TrainConfig, run_dir: Path, files: Dict[str, str], command: List[str], start_time: float
) -> TaskOutcome:
    """Run or resume one job of a sweep, or reuse its complete result.

    Args:
        config: configuration of the combination.
        run_dir: folder for a new run.
        files: contents of the files in .hydra/.
        command: the command line.
        start_time: `time.monotonic()` when the job began; e2e_time counts from there, as that of a single run.

    Raises:
        KeyboardInterrupt: if the job was interrupted, to stop the rest of the sweep too. A joblib worker returns its
            status instead: the process that started the sweep has received the signal too.
    """
    from lit_glm.launch.launcher import announce_early_end, run_job
    from lit_glm.launch.rendezvous import resolve_node

    hydra = HydraConfig.get()
    sweep_dir, status, result, folder = Path(hydra.sweep.dir), 1, None, run_dir
    of = "" if SweepCallback.total is None else f" of {SweepCallback.total}"
    changes = mask_overrides(hydra.job.override_dirname) or "the only combination"
    log.info(f"job {int(hydra.job.num) + 1}{of}: {changes}")
    _mask_multirun_file(sweep_dir)
    reason, reused_from, is_resume = "", "", False
    in_worker = is_joblib(str(hydra.launcher.get("_target_"))) and SweepCallback.started is None
    if in_worker:
        install_worker_handlers()
    stopped = worker_stop_signal()
    if stopped is not None:
        return TaskOutcome(128 + stopped)
    try:
        node = resolve_node(config.topology, config.hardware.runtime == "simulated")
        with announce_early_end(config, node):
            if node.rank == 0:
                earlier = _find_earlier_run(config, run_dir)
                folder, is_resume = run_dir.resolve() if earlier is None else earlier.resolve(), earlier is not None
                if earlier is None and (run_dir / JOB_FILE).exists() and config.sweep.skip_done:
                    folder = _free_folder(run_dir.resolve(), config_hash(config))
                result = _reusable_result(config, folder, is_resume, node)
                reused_from = "" if result is None else str(folder)
            if result is None:
                prepare_data(config)
        stopped = worker_stop_signal()
        if stopped is not None:
            raise Interrupted(stopped)
        if result is None:
            job = JobSpec(config, start_time, command, is_resume, str(sweep_dir.resolve()))
            result = run_job(job, folder, files, node, in_process=False)
        status = 0
    except (InputError, RunError) as error:
        log.error(error)
        status, reason = error.exit_status, str(error)
    except Interrupted as stop:
        log.error(f"{stop}; start the same sweep again to resume it")
        status = stop.exit_status
        if not in_worker:
            raise KeyboardInterrupt from None
        record_worker_stop(status - 128)  # an exception would make joblib kill the runs of the other workers
    finally:
        if _is_first_node():  # which builds the table
            row = {**config_fields(config), "status": "failed", **({"error": reason} if reason else {})}
            more = {"reused_from": reused_from, "objective": config.sweep.objective}
            _write_job_record(sweep_dir, int(hydra.job.num), folder, status, row, list(hydra.overrides.task), **more)
    return TaskOutcome(status, _ranked_value(result or {}, config.sweep.objective))


def _free_folder(run_dir: Path, name: str) -> Path:
    """Return a free folder next to one that contains a run of another configuration or machine."""
    numbers = (f"{run_dir.name}-{name}{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(folder for folder in map(run_dir.with_name, numbers) if not (folder / JOB_FILE).exists())


def _reusable_result(config: TrainConfig, folder: Path, is_resume: bool, node: Node) -> Optional[Dict[str, Any]]:
    """Return the result of a complete combination; None if it has to be run or resumed.

    Raises:
        InputError: if its folder is not available.
        RunError: if another process is running it.
    """
    from lit_glm.launch.launcher import report_complete_run

    if not is_resume:
        ensure_available(folder, config.run.overwrite, "hydra.sweep.dir")
        return None
    result = complete_result(folder)
    if result is not None:
        report_complete_run(config, node, folder, result)
        return result
    if is_running(folder):
        raise RunError(
            f"{folder}: another process is running this combination; when it has exited, start the same sweep "
            "again: complete combinations are not repeated"
        )
    return None


def search_paths(sweep_dir: Path, is_dir_given: bool) -> discovery.SearchPaths:
    """Return where earlier runs of a sweep are searched: its own folder if the user gave one, else all of multirun/."""
    return [(sweep_dir, 3)] if is_dir_given else [(Path("multirun"), 4)]


def _find_earlier_run(config: TrainConfig, run_dir: Path) -> Optional[Path]:
    """Find the run of the same configuration in earlier sweeps, or the one that `run.resume` names."""
    if config.run.resume is not None:
        folder = discovery.resolve_resume(config, run_dir)
    elif config.sweep.skip_done:
        hydra = HydraConfig.get()
        is_dir_given = any(str(override).startswith("hydra.sweep.dir=") for override in hydra.overrides.hydra)
        runs = discovery.runs_by_config_hash(search_paths(Path(hydra.sweep.dir), is_dir_given)).get(
            config_hash(config), []
        )
        folder = discovery.best_run(discovery.reusable_runs(runs, config))
    else:
        folder = None
    if folder is not None:
        ensure_same_config(config, folder)
    return folder


def _mask_multirun_file(sweep_dir: Path) -> None:
    """Mask secrets in Hydra's own record of a sweep, which Hydra writes before the first job."""
    file = sweep_dir / "multirun.yaml"
    if not file.is_file():
        return
    content = OmegaConf.load(file)
    masked = masked_yaml(content)
    if masked != OmegaConf.to_yaml(content):
        write_text(file, masked)


def finish_sweep() -> int:
    """Write the table of the sweep that this process started, if any; return the exit status."""
    with _held_locks:
        sweep_dir = SweepCallback.started
        if sweep_dir is None:
            return 0
        if SweepCallback.processes is not None:
            SweepCallback.processes.print_remaining()
        SweepCallback.started = None
        if not any((sweep_dir / JOB_RECORDS_DIR).glob("*.json")):
            return 0  # no job has started; the error was printed
        text, status = summarise_sweep(sweep_dir)
        _mask_multirun_file(sweep_dir)
        print(text)
        log.info(f"{sweep_dir}/sweep.md, sweep.csv")
        return status


_WRITES = ("sweep.md", "sweep.csv", "multirun.yaml")
_MAX_COMPARED = 300
_held_locks = ExitStack()  # lock of the sweep folder, held until the sweep ends


def _search_direction(composed: Any, line: CommandLine) -> List[str]:
    """Return the override with which a sweeper that has a direction, as Optuna's, finds the best of the objective."""
    direction, objective = composed.hydra.sweeper.get("direction"), composed.sweep.objective
    if direction is None:
        return []
    better = "maximize" if METRICS[objective].better == "higher" else "minimize"
    if line.sets("hydra.sweeper.direction") and str(getattr(direction, "name", direction)) != better:
        raise InputError(
            f"hydra.sweeper.direction={getattr(direction, 'name', direction)}: a {METRICS[objective].better} value of "
            f"sweep.objective={objective} is better; leave the direction out"
        )
    return [f"hydra.sweeper.direction={better}"]


def prepare_sweep(composed: Any, line: CommandLine) -> List[str]:
    """Lock the folder of a sweep, and print for which combinations a run exists.

    Returns:
        Further overrides for the sweep.

    Raises:
        InputError: if the folder is not a sweep folder, another process runs a sweep there, or it contains runs that
            the sweep would neither reuse nor overwrite.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("-m under torchrun: a sweep starts the ranks of its jobs itself; leave torchrun out")
    if composed.sweep.objective not in OBJECTIVES:
        raise InputError(f"sweep.objective={composed.sweep.objective}: must be one of {', '.join(OBJECTIVES)}")
    extra_overrides = _search_direction(composed, line)
    is_dir_given, sweep_dir = line.sets("hydra.sweep.dir"), Path(str(composed.hydra.sweep.dir))
    if is_dir_given and _is_first_node():
        foreign = [name for name in _WRITES if (sweep_dir / name).exists()]
        records_dir = sweep_dir / JOB_RECORDS_DIR
        if not records_dir.is_dir() and foreign:
            raise InputError(
                f"{sweep_dir}: is not a sweep folder (no {JOB_RECORDS_DIR}/) but contains {', '.join(foreign)}, which "
                "a sweep would overwrite; give another hydra.sweep.dir="
            )
        others = [path.name for path in records_dir.glob("*") if path.name != LOCK_FILE and not _is_job_record(path)]
        if others:
            raise InputError(
                f"{records_dir}: contains files that are not job records ({', '.join(sorted(others)[:3])}); give "
                "another hydra.sweep.dir="
            )
        advice = (
            "wait until that sweep has ended (this one, started again, then reuses complete runs), or give another "
            "hydra.sweep.dir="
        )
        _held_locks.enter_context(lock_directory(records_dir, advice))
    sweeps = [override for override in line.parse() if override.is_sweep_override()]
    searches = any(not override.is_discrete_sweep() for override in sweeps)
    is_grid = "BasicSweeper" in str(composed.hydra.sweeper.get("_target_")) and not searches
    is_shuffled = any(getattr(override.value(), "shuffle", False) for override in sweeps)  # Hydra chooses the order
    # A configuration file may add lists to those of the command line, so that the combinations are not known here.
    adds_lists = is_grid and bool(composed.hydra.sweeper.get("params"))
    SweepCallback.total, SweepCallback.complete = None, []
    if is_grid and not adds_lists:
        SweepCallback.total = len(line.combinations())
    complete: Dict[int, CompleteRun] = {}
    if composed.sweep.skip_done and composed.run.resume is None and not adds_lists and _is_first_node():
        runs_by_hash = discovery.runs_by_config_hash(search_paths(sweep_dir, is_dir_given))
        complete = _find_complete_runs(runs_by_hash, line, composed.hydra)
    folders: Any = OmegaConf.to_container(composed.hydra.sweep, resolve=False)
    is_numbered = folders["subdir"] == "${hydra.job.num}"
    if is_numbered and not composed.sweep.skip_done and composed.run.resume is None and _is_first_node():
        # Before the sweep starts: afterwards its table would show rejected jobs instead of the runs that are there.
        for number in range(SweepCallback.total or 1):
            ensure_available(sweep_dir / str(number), composed.run.overwrite, "hydra.sweep.dir")
    if SweepCallback.total is not None and not is_shuffled:
        SweepCallback.complete = list(complete.values())
        SweepCallback.total -= len(complete)
        leave_out_jobs(list(complete), bool(complete) and is_numbered)
    return extra_overrides


def _find_complete_runs(runs_by_hash: Dict[str, List[Path]], line: CommandLine, hydra: Any) -> Dict[int, CompleteRun]:
    """Return the combinations for which a complete run exists, by their number; print what exists for each."""
    complete: Dict[int, CompleteRun] = {}
    elsewhere = str(hydra.launcher.get("_target_")).endswith("SlurmLauncher")  # jobs run on other machines
    combinations = line.combinations() if runs_by_hash else []
    if len(combinations) > _MAX_COMPARED:
        log.info(f"sweep: {len(runs_by_hash)} earlier configurations are compared with each combination at its start")
        return complete
    for number, (changes, overrides) in enumerate(combinations):
        try:
            config = load_config("train", [*overrides, *line.searchpath], TrainConfig)
        except InputError:
            continue  # reported when its job starts
        runs = discovery.reusable_runs(runs_by_hash.get(config_hash(config), []), config, elsewhere)
        run = discovery.best_run(runs)
        if run is None:
            continue
        action = "complete, reused from" if is_complete(run) else "resumed in"
        log.info(f"sweep: {' '.join(map(mask_override, changes)) or 'the only combination'}: {action} {run}")
        if is_complete(run) and config.topology.num_nodes == 1:  # the nodes of a job agree on it when it starts
            parsed = CommandLine([text for text in overrides if not text.startswith("hydra")]).parse()
            # As Hydra writes the overrides of a job.
            task = [f"{entry.get_key_element()}={entry.get_value_element_as_str()}" for entry in parsed]
            complete[number] = (run, task, config)
    return complete
