"""Search loops: node 0 chooses the next batch size, the other nodes run their part of the same trials."""

import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from lit_glm.config.tuned_values import TRIALS_FOLDER
from lit_glm.launch.signals import STOP_SIGNALS, Interrupted
from lit_glm.planning.workload import Workload
from lit_glm.tuning.search_state import FITS, LIMIT, TIME, SearchState, Trial, fastest_bs, largest_bs, next_bs
from lit_glm.tuning.trial_runner import TrialQueue, TrialRunner, iter_trials

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
