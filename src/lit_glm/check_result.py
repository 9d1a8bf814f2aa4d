"""What one check of `doctor` or `verify` came to: a line for people, entries for programs."""

from dataclasses import dataclass
from typing import Any, Optional

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "-   "}


@dataclass
class CheckResult:
    """One line."""

    name: str
    status: str
    """ok; warn: look at it; fail: it would go wrong, or is not to be trusted; skip: nothing was checked."""
    message: str
    advice: str = ""
    """What to do."""
    value: Optional[float] = None
    """What was measured,"""
    bound: Optional[float] = None
    """and what it is held against."""
    artifact: Any = None
    """What the check had to make, for later ones."""

    def line(self) -> str:
        """For people."""
        against = "" if self.value is None or self.bound is None else f" ({self.value:.2g}, bound {self.bound:.2g})"
        advice = f" -> {self.advice}" if self.advice else ""
        return f"{_MARKS[self.status]}  {self.name}: {self.message}{against}{advice}"
