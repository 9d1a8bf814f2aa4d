"""OpenMP settings: number of threads per rank, and how long they spin. Does not import torch.

A step has some hundred parallel regions. Threads that spin while they wait for the next region occupy cores that other
processes need, and a region ends only when its last thread has had a core: next to one busy process a step took 70
times as long (benchmarks/). Therefore spinning is limited before the OpenMP library is loaded, and a step that is too
small for several threads uses one.
"""

import math
import os
from pathlib import Path
from typing import Dict, Optional

SPIN_LIMITS = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""GNU's library: iterations of its wait loop (benchmarks/beside.py); Intel's: milliseconds (not measured)."""
_POLICIES = ("OMP_WAIT_POLICY", "KMP_LIBRARY", *SPIN_LIMITS)
THREAD_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LAUNCHER_THREADS_VARIABLE = "LIT_GLM_THREADS"
"""Set together with OMP_NUM_THREADS if the launcher, not the user, chose that value."""
_WORK_PER_THREAD = 2**24
"""Multiply-adds of a layer per thread: a tenth of a millisecond, the least that justifies a thread."""


def limit_spinning() -> None:
    """Limit the spinning of the OpenMP libraries, unless the user has set how threads wait."""
    if not any(name in os.environ for name in _POLICIES):
        os.environ.update(SPIN_LIMITS)


def available_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its cgroup quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpu_quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def _cgroup_cpu_quota() -> Optional[float]:
    """Return the number of cores that the cgroup may use on average; None if unlimited."""
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
    """Return the variables of ranks that share this machine; {} if the user has set the number of threads."""
    if any(name in os.environ for name in THREAD_COUNT_VARIABLES):
        return {}
    share = str(max(1, available_cores() // devices))
    return {"OMP_NUM_THREADS": share, LAUNCHER_THREADS_VARIABLE: share}


def choose_num_threads(rows: float, width: int, devices: int, previous_threads: Optional[int]) -> Optional[int]:
    """Choose the number of threads of a rank.

    Args:
        rows: average number of rows of a step's batch.
        width: hidden size, D.
        devices: number of ranks on this machine.
        previous_threads: number of a resumed run's earlier part; another number changes the order of summation.

    Returns:
        The number to set; None if the user has set it.
    """
    if LAUNCHER_THREADS_VARIABLE not in os.environ and any(name in os.environ for name in THREAD_COUNT_VARIABLES):
        return None
    share = max(1, available_cores() // devices)
    if previous_threads is not None and previous_threads <= share:
        return previous_threads
    return max(1, min(share, int(rows * 12 * width * width) // _WORK_PER_THREAD))
