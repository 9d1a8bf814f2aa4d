"""The arithmetic of the published figures, apart from everything that measures them."""

from dataclasses import dataclass
from typing import Dict, Optional, Sequence


@dataclass
class Seconds:
    """What a run spent its time on. Each is contained in the next, so rates come out ordered without clamping."""

    pure_compute: float = 0.0
    """Forward, backward, optimizer, the device synchronised at both ends."""
    no_eval: float = 0.0
    """Waiting for data and steps; contains pure_compute."""
    raw_train: float = 0.0
    """First training step to the end of training, evaluations included; contains no_eval."""
    init: float = 0.0
    """Entry of `train` to the first training step, the first evaluation included."""

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(
            self.pure_compute + other.pure_compute,
            self.no_eval + other.no_eval,
            self.raw_train + other.raw_train,
            self.init + other.init,
        )


def rate(samples: int, seconds: float) -> Optional[float]:
    """Samples a second; None without samples or without time."""
    return samples / seconds if samples > 0 and seconds > 0 else None


def figures(samples: int, seconds: Seconds) -> Dict[str, Optional[float]]:
    """The throughputs of the published table.

    Args:
        samples: examples trained on, all ranks together (the published counter: steps x global batch).
        seconds: of the slowest rank in each phase.

    Returns:
        p_whole, p_train, p_core in samples a second, and the times they come from.
    """
    return {
        "p_whole": rate(samples, seconds.raw_train),
        "p_train": rate(samples, seconds.no_eval),
        "p_core": rate(samples, seconds.pure_compute),
        "init_time": seconds.init,
        "raw_train_time": seconds.raw_train,
        "no_eval_time": seconds.no_eval,
        "pure_compute_time": seconds.pure_compute,
    }


def slowest(ranks: Sequence[Seconds]) -> Seconds:
    """The longest time of any rank, phase by phase: each phase stays contained in the next."""
    return Seconds(
        max(rank.pure_compute for rank in ranks),
        max(rank.no_eval for rank in ranks),
        max(rank.raw_train for rank in ranks),
        max(rank.init for rank in ranks),
    )
