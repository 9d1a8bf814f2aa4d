"""result.json: status and metrics of a run, written from the start; tables of results; error files of the ranks."""

import logging
import os
import re
import signal
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional

from lit_glm.atomic_files import read_json, write_json
from lit_glm.config.key_aliases import migrate_names
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.metrics.registry import METRICS, PUBLISHED_COLUMNS, PUBLISHED_METRICS, TABLE_METRICS, cell_text
from lit_glm.metrics.timing import samples_per_second

log = logging.getLogger(__name__)

_FOLDER = "errors"
_KILLED = "killed-"
_ELSEWHERE = "error_folder"
"""File in the temporary folder of a secondary node that names the folder of its errors after the rendezvous."""


def error_reason(error: BaseException) -> str:
    """Return the text of an error for result.json."""
    summary = getattr(error, "summary", "")
    if summary:
        return str(summary)
    text = str(error).strip()
    return text if hasattr(error, "exit_status") and text else f"{type(error).__name__}: {text}"


def set_error_folder(spec_dir: Path, folder: Path) -> None:
    """Redirect the error files of this node's ranks to a folder below the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (spec_dir / _ELSEWHERE).write_text(str(folder), encoding="utf-8")


def error_folder(spec_dir: Path) -> Path:
    """Return the folder for the error files of a node's ranks."""
    try:
        return Path((spec_dir / _ELSEWHERE).read_text(encoding="utf-8"))
    except OSError:
        return spec_dir


def write_error_file(folder: Path, rank: int, error: BaseException) -> None:
    """Write the error file of a rank; a failed write is ignored, so that it does not hide the error."""
    calls = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    prefix = f"rank {rank}: " if os.environ.get("WORLD_SIZE", "1") != "1" and not isinstance(error, InputError) else ""
    _write_error_text(folder, f"rank-{rank}.txt", f"{prefix}{error_reason(error)}\n\n{calls}")


def _write_error_text(folder: Path, name: str, text: str) -> None:
    for _ in range(2):
        try:
            (folder / _FOLDER).mkdir(exist_ok=True)
            (folder / _FOLDER / name).write_text(text, encoding="utf-8")
            return
        except OSError:
            release_reserved_disk_space(folder)  # a full disk


def report_killed_rank(folder: Path, rank: int, number: int) -> None:
    """Report a rank that a signal has killed: on stderr, and in the error file that the rank could not write."""
    name = signal.Signals(number).name
    log.error(f"rank {rank} was killed by {name}")
    if number not in (signal.SIGTERM, signal.SIGABRT):  # these are consequences of other ranks' errors
        _write_error_text(folder, f"{_KILLED}{rank}.txt", f"rank {rank} was killed by {name}\n")


def report_silent_exit(folder: Path, rank: int, status: int) -> None:
    """Write the error file of a rank that has exited without one, as where a library ends the process."""
    if not (folder / _FOLDER / f"rank-{rank}.txt").exists():
        text = f"rank {rank} exited with status {status} and gave no reason"
        log.error(text)
        _write_error_text(folder, f"{_KILLED}{rank}.txt", f"{text}\n")


def clear_error_files(folder: Path) -> None:
    """Delete the error files of an earlier attempt."""
    for note in _error_files(folder):
        note.unlink()


def root_cause(folder: Path) -> Optional[str]:
    """Return the root cause: a killed rank if there is one, else the earliest error; None without any."""
    files = sorted(_error_files(folder), key=lambda file: (not file.name.startswith(_KILLED), file.stat().st_mtime))
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace").split("\n\nTraceback", 1)[0].strip()
        if text:
            return text
    return None


def _error_files(folder: Path) -> List[Path]:
    files = [*(folder / _FOLDER).glob("*-*.txt"), *folder.glob(f"nodes/*/{_FOLDER}/*-*.txt")]
    return [file for file in files if re.fullmatch(rf"(rank-|{_KILLED})\d+\.txt", file.name)]  # others are not ours


RESULT_FILE = "result.json"
SCHEMA_VERSION = 3
COMPLETE = ("success", "finished")
"""Status values of a run that is complete and need not be resumed."""
RESERVE_FILE = ".room"
_RESERVED_BYTES = 2**16
"""Disk space reserved during a run, so that the final status can be written even if the disk becomes full."""


def read_result(run_dir: Path) -> Optional[Dict[str, Any]]:
    """Read the result of a run folder; None if it is missing or unreadable."""
    content = _read_file(run_dir)
    return None if content is None else settled(content)


def _read_file(run_dir: Path) -> Optional[Dict[str, Any]]:
    content = read_json(run_dir / RESULT_FILE)
    return None if content is None else migrate_names(content, "result.json")


def settled(result: Dict[str, Any]) -> Dict[str, Any]:
    """Return a result whose status is the outcome that rank 0 wrote, unless the launcher has written another one."""
    outcome = result.get("outcome")
    status = result.get("status") if outcome is None or result.get("status") != "running" else outcome
    return {**{key: value for key, value in result.items() if key != "outcome"}, "status": status}


def settle_status(run_dir: Path) -> Optional[Dict[str, Any]]:
    """Make the outcome of the ranks the status of the run, when they have exited.

    Rank 0 writes its final metrics with an outcome and the status "running"; the launcher alone decides how the run
    has ended.

    Returns:
        The result; None if the ranks wrote no outcome.
    """
    result = _read_file(run_dir)
    if result is None or "outcome" not in result:
        return None
    replace_result(run_dir, settled(result))
    return settled(result)


def is_complete(run_dir: Path) -> bool:
    """Return whether the run of a folder is complete and need not be resumed."""
    return (read_result(run_dir) or {}).get("status") in COMPLETE


def config_fields(config: TrainConfig) -> Dict[str, Any]:
    """Return the fields of a result that describe its configuration."""
    return {
        "hardware": config.hardware.name,
        "topology": config.topology.name,
        "precision": config.precision.name,
        "scoring": config.scoring.name,
        "fix_hp": config.fix_hp,
        "bs": config.bs,
        "lr": config.lr,
        "seed": config.seed,
        "model": config.model.name,
        "gelu": config.model.gelu,
        "fix_hp_source": config.fix_hp_source,
        "profiled": config.profiled,
    }


def write_initial_result(run_dir: Path, config: TrainConfig) -> None:
    """Write a result without metrics, so that a run that fails before its first step has a row too."""
    unmeasured = dict.fromkeys([*(metric.name for metric in TABLE_METRICS if not metric.path), "mem_total_gib", "mfu"])
    rehearsal = config.hardware.runtime == "simulated"
    row = {"status": "running", **config_fields(config), **unmeasured, "converged": False, "simulated": rehearsal}
    write_json(run_dir / RESULT_FILE, {**row, "global_steps": 0, "schema_version": SCHEMA_VERSION})


def reserve_disk_space(run_dir: Path) -> None:
    """Reserve the disk space that the end of a run needs."""
    (run_dir / RESERVE_FILE).write_bytes(b"\0" * _RESERVED_BYTES)


def release_reserved_disk_space(run_dir: Path) -> None:
    """Release the reserved disk space."""
    try:
        (run_dir / RESERVE_FILE).unlink()
    except OSError:
        pass


def update_result(run_dir: Path, **changes: Any) -> None:
    """Change entries of an existing result."""
    result = _read_file(run_dir)
    if result is not None:
        replace_result(run_dir, {**result, **changes})


def replace_result(run_dir: Path, result: Dict[str, Any]) -> None:
    """Write result.json; a failed write is ignored, so that it does not hide how the run ended."""
    for _ in range(2):
        try:
            write_json(run_dir / RESULT_FILE, result)
            return
        except OSError:
            release_reserved_disk_space(run_dir)


def extend_times_to_end(run_dir: Path, start_time: float) -> None:
    """Add the time since the last record of a run that ended without its final metrics: failed, killed or hanging.

    A resumed run has several parts. A part that wrote no record had not started to train; its time is not added.

    Args:
        run_dir: the run folder.
        start_time: `time.monotonic()` at the start of this part.
    """
    result = _read_file(run_dir) or {}
    earlier, recorded, trained = (result.get(name) for name in ("earlier_e2e_time", "e2e_time", "raw_train_time"))
    if result.get("status") != "running" or "outcome" in result or earlier is None or recorded is None:
        return
    unrecorded_s = time.monotonic() - start_time + earlier - recorded
    if unrecorded_s <= 0:
        return
    spans = result.get("training_spans")
    changes = {"e2e_time": recorded + unrecorded_s}
    if spans:
        changes["training_spans"] = [*spans[:-1], [spans[-1][0], spans[-1][1] + unrecorded_s]]
    if trained is not None:
        changes["raw_train_time"] = trained + unrecorded_s
        changes["p_whole"] = samples_per_second(result["num_trained_samples"], trained + unrecorded_s)
    update_result(run_dir, **changes)


def mark_failed(run_dir: Path, reason: str) -> None:
    """Set the status to failed with a reason, unless the run is complete."""
    if not is_complete(run_dir):
        update_result(run_dir, status="failed", error=reason)


def mark_interrupted(run_dir: Path) -> None:
    """Set the status to interrupted, unless the result already has a final status."""
    if (read_result(run_dir) or {}).get("status") == "running":
        update_result(run_dir, status="interrupted")


_SKIPPED_SHARE = 0.01
CONTENTION_THRESHOLD = 0.1
"""Share of the CPUs used by other processes above which a row is annotated."""


def has_many_skipped_steps(result: Dict[str, Any]) -> bool:
    """Return whether more than 1 % of a run's steps had no update."""
    skipped, steps = result.get("skipped_steps"), result.get("global_steps")
    known = isinstance(skipped, int) and isinstance(steps, int)
    return known and steps > 0 and skipped > _SKIPPED_SHARE * steps  # type: ignore[operator]


def was_contended(result: Dict[str, Any]) -> bool:
    """Return whether other processes used more than a tenth of the CPUs, or the same devices."""
    return contending_cpu_load(result) > 0 or has_shared_devices(result)


def contending_cpu_load(result: Dict[str, Any]) -> float:
    """Return the share of the CPUs that other processes used; 0 if it is at most a tenth, or unknown."""
    load = result.get("external_cpu_load")
    return load if isinstance(load, float) and load > CONTENTION_THRESHOLD else 0.0


def has_shared_devices(result: Dict[str, Any]) -> bool:
    """Return whether other processes used the same devices."""
    on_devices = result.get("external_device_processes")
    return isinstance(on_devices, int) and on_devices > 0


def text_list(value: Any) -> List[str]:
    """Return a list of strings from a result; empty if the value is of another type."""
    return [str(entry) for entry in value] if isinstance(value, list) else []


def annotations(result: Dict[str, Any]) -> List[str]:
    """Return the annotations of a table row."""
    repeated, load = result.get("repeated_steps"), contending_cpu_load(result)
    changes, missing = text_list(result.get("environment_changes")), text_list(result.get("missing_data"))
    again = f", {repeated} steps repeated" if repeated else ""
    skipped = f"{result.get('skipped_steps')} of {result.get('global_steps')} steps skipped"
    notes = [
        (result.get("simulated"), "simulated"),
        (result.get("computed_on_cpu"), "computed on the CPU"),
        (result.get("mem_total_source") == "hardware file", "device memory from the hardware file"),
        (result.get("profiled"), "profiled"),
        (result.get("status") not in COMPLETE, str(result.get("status"))),
        (result.get("interruptions"), f"resumed {result.get('interruptions')}x{again}"),
        (has_many_skipped_steps(result), skipped),
        (load, f"contention: other processes used {load:.0%} of the CPUs"),
        (has_shared_devices(result), "contention: other processes used the devices"),
        (changes, f"on several machines: {'; '.join(changes)}"),
        (missing, "; ".join(missing)),
        (result.get("reused_from"), f"reused from {result.get('reused_from')}"),
    ]
    return [text for applies, text in notes if applies]


def table_cells(result: Dict[str, Any]) -> List[str]:
    """Format a result in the published formats, one text per column; empty if nothing was measured."""
    notes = annotations(result)
    mark = f" ({', '.join(notes)})" if notes else ""
    precision = str(result.get("precision") or "")
    metric_cells = [
        cell_text(metric, metric.value(result), METRICS[metric.of].value(result) if metric.of else None)
        for metric in PUBLISHED_METRICS
    ]
    return [
        f"{result['hardware']} {result['topology']}{mark}",
        f"{precision}{' (TF32)' if result.get('tf32') and precision == 'fp32' else ''}",
        str(result.get("fix_hp") or ""),
        *metric_cells,
    ]


def results_table(results: List[Dict[str, Any]]) -> str:
    """Format results as a Markdown table, with columns and order as published; several scorings are named."""
    rows, scorings = [table_cells(result) for result in results], {str(result.get("scoring")) for result in results}
    for row, result in zip(rows, results):
        row[0] += f" scoring={result.get('scoring')}" if len(scorings) > 1 else ""
        row[:] = [" ".join(cell.replace("|", "\\|").split()) for cell in row]  # of a folder's name, or a foreign result
    return markdown_table([list(PUBLISHED_COLUMNS), *rows])


def markdown_table(rows: List[List[str]]) -> str:
    """Format rows of text as a Markdown table with aligned columns; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


_SLOW = 1.5
"""Slowdown of the first steps from which a warm-up is reported."""


def final_summary(result: Dict[str, Any], config: TrainConfig, run_dir: Path) -> str:
    """Return the final message of a run."""
    run, step, samples = config.run, result["global_steps"], result["num_trained_samples"]
    train_s = result.get("raw_train_time")
    when = f"at step {step} ({samples:,} samples, {'unknown' if train_s is None else f'{train_s:.1f} s'} of training)"
    target = f"{100 * run.target_accuracy:g}%"
    accuracy = cell_text(METRICS["acc"], result.get("acc")) or "unknown"
    if result["status"] == "success":
        summary = f"REACHED: accuracy {accuracy}, target {target}, {when}"
    elif result["status"] == "interrupted":
        saved = run.checkpoint_interval_steps is not None
        on = f"resume with run.resume={run_dir}" if saved else "no checkpoint (run.checkpoint_interval_steps=null)"
        summary = f"STOPPED {when}: accuracy {accuracy}, target {target}; {on}"
    else:
        limit = f"run.max_samples={run.max_samples}"
        if run.max_steps is not None and step >= run.max_steps:
            limit = f"run.max_steps={run.max_steps}"
        elif step * config.global_batch <= run.max_samples:
            limit = "a callback"
        state = f"accuracy {accuracy}, target {target}" if run.evaluate else "no evaluation (run.evaluate=false)"
        summary = f"NOT REACHED: {state}; stopped by {limit} {when}"
    skipped = result.get("skipped_steps") or 0
    summary += f"; {skipped} steps without an update" if skipped else ""
    summary += _warmup_message(result.get("first_steps"))
    return f"{summary}\nrun folder {run_dir}; report: python -m lit_glm.report {run_dir}"


def _warmup_message(start: Optional[Dict[str, float]]) -> str:
    """Return a line if the first steps took far longer than the same work later, else ""."""
    if start is None or start["slowdown"] < _SLOW:
        return ""
    which = "step" if start["count"] == 1 else f"{start['count']} steps"
    return (
        f"\nwarm-up: the first {which} took {start['seconds']:.1f} s, {start['slowdown']:.1f}x a steady-state step of "
        "the same work; included in p_core, p_train and p_whole"
    )
