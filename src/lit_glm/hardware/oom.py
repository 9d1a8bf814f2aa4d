"""Tells a lack of memory from other errors, whoever says it."""

import re
from pathlib import Path

_SAYS = re.compile(
    r"out of memory|can(?:'|no)t allocate memory|not enough memory|bad_alloc|bad allocation|ALLOC_FAILED|"
    r"Unable to allocate|failed to allocate",
    re.IGNORECASE,
)


def is_oom_error(error: BaseException) -> bool:
    """Whether an error means that a device, or the machine, has too little memory for what was asked."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and _SAYS.search(str(error)) is not None


def oom_kill_count() -> int:
    """How many processes the kernel has killed so far because the machine, or this container, had no memory left."""
    count = 0
    for file in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            found = re.search(r"^oom_kill (\d+)$", Path(file).read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            continue
        count = max(count, int(found.group(1)) if found else 0)
    return count
