"""Choice of the next batch size, as a pure function of the trials so far, so that a search can be resumed."""

import statistics
from dataclasses import dataclass
from typing import Dict, List, Optional

FITS, MEMORY, LIMIT, TIME = "fits", "out of memory", "not tried", "no time"


@dataclass
class Trial:
    """One trial of a batch size."""

    bs: int
    status: str
    p_core: Optional[float] = None
    """Samples per second, for examples of average length."""
    mfu: Optional[float] = None
    memory_gib: Optional[float] = None
    samples_per_joule: Optional[float] = None
    message: str = ""
    """Why it does not fit."""


def trials_by_bs(tries: List[Trial]) -> Dict[int, List[Trial]]:
    """Group the trials that fit by batch size."""
    found: Dict[int, List[Trial]] = {}
    for one in tries:
        if one.status == FITS and one.p_core is not None:
            found.setdefault(one.bs, []).append(one)
    return dict(sorted(found.items()))


def median_p_core(tries: List[Trial]) -> float:
    """Return the median p_core of trials."""
    return statistics.median(one.p_core or 0.0 for one in tries)


def largest_bs(tries: List[Trial]) -> Optional[int]:
    """Return the largest batch size that fits; None if none does."""
    return max(trials_by_bs(tries), default=None)


def fastest_bs(tries: List[Trial]) -> Optional[int]:
    """Return the batch size with the highest median p_core, the smaller one of equals; None without trials."""
    known = trials_by_bs(tries)
    return max(known, key=lambda bs: (median_p_core(known[bs]), -bs), default=None)


def next_bs(tries: List[Trial], most: int, repeats: int) -> Optional[int]:
    """Return the batch size to try next.

    Args:
        tries: the trials so far.
        most: the largest batch size that the data allows.
        repeats: maximum number of trials per batch size.

    Returns:
        The batch size; None if the search is complete.
    """
    known = trials_by_bs(tries)
    too_large = [one.bs for one in tries if one.status != FITS]
    low, high = max(known, default=0), min(too_large, default=most + 1)
    if low == 0:
        return 1 if not too_large else None
    if high > most and low < most:
        return min(2 * low, most)  # double until one does not fit
    if high - low > max(1, low // 16):
        return (low + high) // 2
    return _refine(known) or _repeat(known, repeats)


def _refine(known: Dict[int, List[Trial]]) -> Optional[int]:
    """Return a batch size next to the fastest if a neighbour is more than a quarter away; else None."""
    order = list(known)
    best = max(known, key=lambda bs: median_p_core(known[bs]))
    place = order.index(best)
    for low, high in ((place, place + 1), (place - 1, place)):
        if low >= 0 and high < len(order) and order[high] - order[low] > max(1, order[low] // 4):
            return (order[low] + order[high]) // 2
    return None


def _repeat(known: Dict[int, List[Trial]], repeats: int) -> Optional[int]:
    """Return which of the two fastest to repeat: each at least twice, then while their ranges overlap; else None."""
    best, *others = sorted(known, key=lambda bs: -median_p_core(known[bs]))[:2]
    for bs in [best, *others]:
        if len(known[bs]) < min(2, repeats):
            return bs
    if not others:
        return None
    slower = others[0]
    apart = min(one.p_core or 0.0 for one in known[best]) > max(one.p_core or 0.0 for one in known[slower])
    fewer = min((best, slower), key=lambda bs: len(known[bs]))
    return None if apart or len(known[fewer]) >= repeats else fewer
