"""How many threads a processor's step takes, and how long they spin for each other. Nothing here imports torch.

A step has some hundred parallel regions. Threads that wait for the next one by spinning take the core of whoever else
computes, and a region ends when its last thread had a core: beside one busy process a step took 70 times as long
(benchmarks/). So spinning is bounded, before the OpenMP library is loaded, and a step that is too small for threads
takes one.
"""

import math
import os
from pathlib import Path
from typing import Dict, Optional

SPIN_LIMITS = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""GNU's library: turns of its waiting loop (benchmarks/beside.py); Intel's: milliseconds (not measured)."""
_POLICIES = ("OMP_WAIT_POLICY", "KMP_LIBRARY", *SPIN_LIMITS)
THREAD_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LAUNCHER_THREADS_VARIABLE = "LIT_GLM_THREADS"
"""Set beside OMP_NUM_THREADS where that is the launcher's and not the user's."""
_WORK_PER_THREAD = 2**24
"""Multiply-adds of a layer that are worth a thread: a tenth of a millisecond."""


def limit_spinning() -> None:
    """Bound the spinning of the OpenMP libraries; where the user has said how threads wait, that stays."""
    if not any(name in os.environ for name in _POLICIES):
        os.environ.update(SPIN_LIMITS)


def available_cores() -> int:
    """Cores that this process may use, by its affinity and the quota of its control groups."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpu_quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def _cgroup_cpu_quota() -> Optional[float]:
    """Cores that the control group may use on average; None: all of them."""
    for path, period_path in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = Path(path).read_text(encoding="ascii").split()
            period = words[1] if period_path is None else Path(period_path).read_text(encoding="ascii")
            if words[0] != "max" and float(words[0]) > 0:
                return float(words[0]) / float(period)
        except (OSError, ValueError, IndexError):
            continue
    return None


def omp_env_for_ranks(devices: int) -> Dict[str, str]:
    """Variables of ranks that share this machine; none where the user has said how many threads they take."""
    if any(name in os.environ for name in THREAD_COUNT_VARIABLES):
        return {}
    share = str(max(1, available_cores() // devices))
    return {"OMP_NUM_THREADS": share, LAUNCHER_THREADS_VARIABLE: share}


def choose_num_threads(rows: float, width: int, devices: int, begun_with: Optional[int]) -> Optional[int]:
    """Threads of a rank.

    Args:
        rows: of a step's batch, on the average.
        width: D.
        devices: ranks on this machine.
        begun_with: of a run that goes on, what it began with: another number sums up in another order.

    Returns:
        How many to set; None: the user has said it.
    """
    if LAUNCHER_THREADS_VARIABLE not in os.environ and any(name in os.environ for name in THREAD_COUNT_VARIABLES):
        return None
    share = max(1, available_cores() // devices)
    if begun_with is not None and begun_with <= share:
        return begun_with
    return max(1, min(share, int(rows * 12 * width * width) // _WORK_PER_THREAD))
