"""What one check came to."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, Optional

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "-   "}


@dataclass
class Check:
    """One line of a verification."""

    name: str
    status: str
    """ok; warn: look at it; fail: what is computed or told is not to be trusted; skip: nothing was checked."""
    said: str
    figure: Optional[float] = None
    """What was measured,"""
    bound: Optional[float] = None
    """and what it is held against."""
    advice: str = ""
    """What to do."""

    def line(self) -> str:
        """For people."""
        against = "" if self.figure is None or self.bound is None else f" ({self.figure:.2g}, bound {self.bound:.2g})"
        advice = f" -> {self.advice}" if self.advice else ""
        return f"{MARKS[self.status]}  {self.name}: {self.said}{against}{advice}"

    def plain(self) -> Dict[str, Any]:
        """For programs."""
        return asdict(self)


def of_error(name: str, error: BaseException) -> Check:
    """Whatever a check raises is a line too, and hides no other."""
    text = " ".join(str(error).split())[:300]
    return Check(name, "fail", f"{type(error).__name__}: {text}" if text else type(error).__name__)
