"""Result of one check of `doctor` or `verify`."""

from dataclasses import dataclass
from typing import Any, Optional

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "-   "}


@dataclass
class CheckResult:
    """Result of one check, with a line of text for the user and fields for programs."""

    name: str
    status: str
    """ok; warn: needs attention; fail: a run would fail or cannot be trusted; skip: nothing was checked."""
    message: str
    advice: str = ""
    """Advice on what to do."""
    value: Optional[float] = None
    """Measured value."""
    bound: Optional[float] = None
    """Bound that the value is compared with."""
    artifact: Any = None
    """Object that the check created, for later checks."""

    def line(self) -> str:
        """Return the line of text for the user."""
        against = "" if self.value is None or self.bound is None else f" ({self.value:.2g}, bound {self.bound:.2g})"
        advice = f" -> {self.advice}" if self.advice else ""
        return f"{_MARKS[self.status]}  {self.name}: {self.message}{against}{advice}"
