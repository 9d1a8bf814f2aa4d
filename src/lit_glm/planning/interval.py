"""A figure that is known to lie between two values."""

from dataclasses import dataclass
from typing import List


@dataclass(frozen=True)
class Interval:
    """From low to high, both above or equal to 0."""

    low: float
    high: float

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Interval":
        return Interval(self.low * factor, self.high * factor)

    def over(self, amount: float) -> "Interval":
        """An amount divided by this: the larger this is, the less comes out."""
        return Interval(amount / self.high, amount / self.low)

    def widened(self, share: float) -> "Interval":
        """Lower and higher by a share."""
        return Interval(self.low / (1.0 + share), self.high * (1.0 + share))

    def pair(self) -> List[float]:
        """For JSON."""
        return [self.low, self.high]

    def text(self, digits: int = 3) -> str:
        """Such as `4.1-5.2`; one number where both are the same at that precision."""
        low, high = f"{self.low:.{digits}g}", f"{self.high:.{digits}g}"
        return low if low == high else f"{low}-{high}"


def hull(values: List[float]) -> Interval:
    """From the lowest to the highest."""
    return Interval(min(values), max(values))
