"""Search loops on node 0 and the others, and the trials: short runs of `train`, shared through a queue of files."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np
import psutil

from lit_glm.atomic_files import write_json
from lit_glm.config.tuned_values import TRIALS_FOLDER
from lit_glm.errors import RunError
from lit_glm.launch.signals import STOP_SIGNALS, Interrupted
from lit_glm.planning.workload import Workload
from lit_glm.process_utils import GRACE_S, set_parent_death_signal, terminate_tree
from lit_glm.runs.result import read_result
from lit_glm.runs.run_writer import STEP_COLUMNS, read_csv_rows
from lit_glm.tuning.search_state import FITS, LIMIT, MEMORY, TIME, SearchState, Trial, fastest_bs, largest_bs, next_bs

UNTIMED = 3
"""Number of warm-up steps, which touch memory and start kernels; the first one has the longest examples."""
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass
class TrialRunner:
    """Runner of the trials of a search."""

    overrides: List[str]
    """Overrides of the command line, without those that a trial sets itself."""
    flags: List[str]
    steps: int

    def command(self, bs: int, folder: Path) -> List[str]:
        """Return the command of a trial: few steps, longest examples first, no evaluation, checkpoint or logger."""
        own = [
            f"bs={bs}",
            f"run.max_steps={UNTIMED + self.steps}",
            "run.max_samples=1000000000000",
            "run.evaluate=false",
            "data.longest_first=true",
            "run.checkpoint_interval_steps=null",
            "model.init_checkpoint=null",
            "logger=none",
            "callbacks=none",
            f"hydra.run.dir='{folder}'",
            "run.overwrite=true",
        ]
        return [sys.executable, "-m", "lit_glm.train", *self.overrides, *own, *self.flags]

    def run(self, bs: int, folder: Path, work: Workload, seconds: float) -> Trial:
        """Run a trial of a batch size.

        Args:
            bs: the batch size.
            folder: run folder; the output goes to a .txt file of the same name next to it.
            work: workload of the steps.
            seconds: time limit.

        Raises:
            RunError: if it failed for another reason than a lack of memory or time.
        """
        log = folder.with_suffix(".txt")
        status = self._status(bs, folder, log, seconds)
        if status is None:
            return Trial(bs, TIME, message=f"exceeded the remaining {seconds:.0f} s")
        result = read_result(folder) or {}
        error = str(result.get("error") or "")
        if "out of memory" in error or status in _KILLED:
            return Trial(bs, MEMORY, message=error or "killed, most likely out of memory")
        if status != 0:
            raise RunError(f"bs={bs} exited with status {status}: {error or _last_line(log)} (full output: {log})")
        return _trial_from_run(bs, folder, work, result)

    def take_part(self, bs: int, folder: Path, node: int, seconds: float) -> None:
        """Run the part of a secondary node in a trial; node 0 evaluates the result."""
        self._status(bs, folder, folder.with_suffix(f".node{node}.txt"), seconds)

    def _status(self, bs: int, folder: Path, log: Path, seconds: float) -> Optional[int]:
        """Run a trial and return its exit status; None if it was terminated at its time limit."""
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                self.command(bs, folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(set_parent_death_signal, signal.SIGTERM),
            )
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                terminate_tree(psutil.Process(process.pid), GRACE_S)
                return None
            except BaseException:
                terminate_tree(psutil.Process(process.pid), GRACE_S)
                raise


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _trial_from_run(bs: int, folder: Path, work: Workload, result: "dict[str, Any]") -> Trial:
    """Return a trial whose p_core follows from the FLOPs of the timed steps, so that their lengths do not bias it."""
    rows = read_csv_rows(folder / "steps.csv", STEP_COLUMNS)[UNTIMED:]
    flops = np.array([float(work.counter.flops_by_rank(int(row["step"])).mean()) for row in rows])
    seconds = sum(float(row["compute_s"]) for row in rows)
    per_sample = work.mean / bs
    p_core: Optional[float] = float(flops.sum()) / per_sample / seconds * work.ranks if seconds else None
    return Trial(
        bs,
        FITS,
        p_core,
        result.get("mfu"),
        result.get("mem_actual_gib"),
        result.get("samples_per_joule"),
    )


_FOLDER = "orders"
_LOOK_S = 0.2


class TrialQueue:
    """Queue of one start of a search. Each start has its own folder, so that trials of an earlier start are ignored."""

    def __init__(self, folder: Path) -> None:
        """Create the queue, and mark the queues of earlier starts as finished.

        Args:
            folder: folder of the search.
        """
        place = folder / _FOLDER
        place.mkdir(parents=True, exist_ok=True)
        for before in place.iterdir():
            write_json(before / "9999.json", {"bs": None})
        self._place = place / f"{time.time_ns():020}"
        self._place.mkdir()
        self._given = 0

    def put(self, bs: Optional[int], folder: str) -> None:
        """Enqueue a trial; None ends the queue."""
        write_json(self._place / f"{self._given:04}.json", {"bs": bs, "folder": folder})
        self._given += 1


def iter_trials(folder: Path, patience_s: float) -> Iterator[Tuple[int, str]]:
    """Yield batch size and folder of each trial of the newest unfinished start, in order.

    Args:
        folder: folder of the search.
        patience_s: seconds to wait for the next trial.

    Raises:
        RunError: if no trial is enqueued in time.
    """
    own: Optional[Path] = None
    number, until = 0, time.monotonic() + patience_s
    while time.monotonic() < until:
        if own is None:
            starts = sorted((folder / _FOLDER).glob("*")) if (folder / _FOLDER).is_dir() else []
            own = starts[-1] if starts and not _is_finished(starts[-1]) else None
        file = None if own is None else own / f"{number:04}.json"
        if file is None or not file.is_file():
            time.sleep(_LOOK_S)
            continue
        order = json.loads(file.read_text(encoding="utf-8"))
        if order["bs"] is None:
            return
        yield int(order["bs"]), str(order["folder"])
        number, until = number + 1, time.monotonic() + patience_s
    raise RunError(
        f"node 0 started no trial for {patience_s:.0f} s (searched in {folder / _FOLDER}: do all nodes share it?)"
    )


def _is_finished(start: Path) -> bool:
    files = sorted(start.glob("*.json"))
    return bool(files) and json.loads(files[-1].read_text(encoding="utf-8"))["bs"] is None


log = logging.getLogger(__name__)


def run_coordinator(config: Any, trials: TrialRunner, folder: Path, train: Any) -> int:
    """Search until the result is known or the time is over; return the exit status."""
    _install_stop_handlers()
    record = SearchState(folder, config)
    if record.trials:
        log.info(f"resuming after {len(record.trials)} trials")
    runtime = _make_memory_runtime(config)
    limit, most = record.seconds + 60.0 * config.tune.max_minutes, len(train) // config.topology.world_size
    orders = TrialQueue(folder) if config.topology.num_nodes > 1 else None
    record.write(complete=False)  # marks the folder as this search's
    status = 0
    try:
        while True:
            bs = next_bs(record.trials, most, config.tune.repeats)
            left = limit - record.seconds
            if bs is None or left <= 0:
                break
            begun = time.monotonic()
            work = _workload_for_bs(config, bs, train)
            tried = _exceeds_memory(work, config, bs, runtime)
            if tried is None:
                number = sum(one.bs == bs for one in record.trials)
                place = folder / TRIALS_FOLDER / f"bs{bs}_{number}"
                if orders is not None:
                    orders.put(bs, str(place.relative_to(folder)))
                try:
                    tried = trials.run(bs, place, work, left)
                finally:
                    record.seconds += time.monotonic() - begun
            record.trials.append(tried)
            record.write(complete=False)
            log.info(f"{_trial_line(tried)}")
            if tried.status == TIME:
                break
        if record.seconds >= limit or (record.trials and record.trials[-1].status == TIME):
            log.info(
                f"tune.max_minutes={config.tune.max_minutes:g} is over: results so far; "
                f"resume with a larger value and run.resume={folder}"
            )
    except Interrupted as stop:
        record.write(complete=False)
        log.error(f"{stop}; resume with run.resume={folder}")
        status = stop.exit_status
    finally:
        if orders is not None:
            orders.put(None, "")
    best, top = fastest_bs(record.trials), largest_bs(record.trials)
    last = best or top or 1
    answered = [one for one in record.trials if one.status != TIME]
    complete = next_bs(answered, most, config.tune.repeats) is None
    print(record.conclude(_workload_for_bs(config, last, train), _software_versions(), complete), flush=True)
    record.write(complete)
    return status or (0 if best is not None else 1)


def run_follower(config: Any, trials: TrialRunner, folder: Path) -> int:
    """Run this node's part of each trial that node 0 starts."""
    _install_stop_handlers()
    log.info(f"waiting for node 0 to start a trial in {folder}")
    for bs, place in iter_trials(folder, config.run.stall_timeout_s):
        trials.take_part(bs, folder / place, int(os.environ["NODE_RANK"]), config.run.stall_timeout_s)
    return 0


def _install_stop_handlers() -> None:
    """Make stop signals end the running trial and the search, whose state is saved."""

    def stop(number: int, _frame: Any) -> None:
        raise Interrupted(number)

    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)


def _make_memory_runtime(config: Any) -> Any:
    """Create a runtime to query the device memory; None if only the ranks may query it."""
    if config.hardware.accelerator != "cpu" and config.hardware.runtime != "simulated":
        return None  # a driver opened by this process would interfere with the trials
    from lit_glm.hardware.runtimes.selection import make_runtime

    return make_runtime(config.hardware, config.topology)


def _workload_for_bs(config: Any, bs: int, train: Any) -> Workload:
    data = replace(config.data, longest_first=True)
    return Workload(replace(config, bs=bs, data=data), train, None)


def _exceeds_memory(work: Workload, config: Any, bs: int, runtime: Optional[Any]) -> Optional[Trial]:
    """Return a trial that is not run because its estimate far exceeds the memory, which could crash the host."""
    from lit_glm.metrics.memory_estimate import check_memory

    if runtime is None:
        return None
    found = check_memory(replace(config, bs=bs), work.lengths, runtime)
    if (
        found.available_bytes is None or found.estimate.total <= 1.1 * found.available_bytes
    ) and not found.host_message:
        return None
    own = "" if found.available_bytes is None else f" of {found.available_bytes / 2**30:.1f}"
    return Trial(bs, LIMIT, message=found.host_message or f"estimated at {found.estimate.total / 2**30:.1f}{own} GiB")


def _trial_line(tried: Trial) -> str:
    if tried.status != FITS:
        return f"bs={tried.bs}: {tried.status} ({tried.message[:160]})"
    memory = "" if tried.memory_gib is None else f", {tried.memory_gib:.2f} GiB"
    return f"bs={tried.bs}: {tried.p_core or 0.0:.4g} samples/s{memory}"


def _software_versions() -> str:
    import datetime

    import torch

    import lit_glm

    return f"lit_glm {lit_glm.__version__}, torch {torch.__version__}, {datetime.date.today()}"
