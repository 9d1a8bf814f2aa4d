"""Event lines as FlagPerf writes them, so that tools which read FlagPerf's logs read these.

[PerfLog] {"event": "STEP_END", "value": {...}, "metadata": {"file": F, "lineno": N, "time_ms": T, "rank": 0}}
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional


class PerfLog:
    """perf.log of a run folder, appended to line by line."""

    def __init__(self, path: Path, do: Callable[[Callable[[], Any]], None] = lambda call: call()) -> None:
        """Open the file.

        Args:
            path: the file.
            do: calls what writes a line, now or later; what the line says is fixed at once.
        """
        self._do = do
        self._file = path.open("a", encoding="utf-8")

    def event(self, name: str, value: Optional[Any], time_ms: int, **keys: Any) -> None:
        """Write one event.

        Args:
            name: STEP_END, EVALUATE, ...
            value: a dict goes under "value", a plain text under "other"; None: neither.
            time_ms: when it happened, since the epoch.
            keys: step, epoch or loss.
        """
        caller = sys._getframe(2)  # who told the recorder
        line: Dict[str, Any] = {"event": name}
        if value is not None:
            line["other" if isinstance(value, str) else "value"] = value
        line.update(keys)
        line["metadata"] = {
            "file": caller.f_code.co_filename,
            "lineno": caller.f_lineno,
            "time_ms": time_ms,
            "rank": 0,
        }
        self._do(lambda: self._write(line))

    def _write(self, line: Dict[str, Any]) -> None:
        self._file.write(f"[PerfLog] {json.dumps(_finite(line))}\n")
        self._file.flush()


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a number becomes null."""
    if hasattr(value, "item"):
        value = value.item()  # a tensor, read here and not where the step is timed
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return value
