"""Event lines as FlagPerf writes them, so that tools which read FlagPerf's logs read these.

[PerfLog] {"event": "STEP_END", "value": {...}, "metadata": {"file": F, "lineno": N, "time_ms": T, "rank": 0}}
"""

import inspect
import json
import math
import time
from pathlib import Path
from typing import Any, Dict, Optional

_FLUSH_EVERY_S = 0.05


class PerfLog:
    """perf.log of a run folder, appended to line by line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._flushed = 0.0

    def event(self, name: str, value: Optional[Any], time_ms: int, **keys: Any) -> None:
        """Write one event.

        Args:
            name: STEP_END, EVALUATE, ...
            value: a dict goes under "value", a plain text under "other"; None: neither.
            time_ms: when it happened, since the epoch.
            keys: step, epoch or loss.
        """
        here = inspect.currentframe()
        teller = here.f_back.f_back if here is not None and here.f_back is not None else None  # of `Events.tell`
        line: Dict[str, Any] = {"event": name}
        if value is not None:
            line["other" if isinstance(value, str) else "value"] = value
        line.update(keys)
        line["metadata"] = {
            "file": "" if teller is None else teller.f_code.co_filename,
            "lineno": 0 if teller is None else teller.f_lineno,
            "time_ms": time_ms,
            "rank": 0,
        }
        self._file.write(f"[PerfLog] {json.dumps(_finite(line))}\n")
        # steps.csv has every step at once; a second write to a file would be a good part of a short one.
        if not name.startswith("STEP_") or time.monotonic() > self._flushed + _FLUSH_EVERY_S:
            self._file.flush()
            self._flushed = time.monotonic()


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return value
