"""From work, speed and links to a row: memory and fit, seconds a step, throughput, time and energy of the whole run."""

from dataclasses import dataclass
from typing import Any, Dict, Optional

from lit_glm.config.schema import TrainConfig
from lit_glm.metrics.memory_estimate import count_parameters, estimate_memory
from lit_glm.planning.cost_model import Interval, RankSpeed, saves_attention_probs
from lit_glm.planning.workload import Workload

_GIB = 2.0**30
_UNKNOWN_LINK = Interval(8.0, 300.0)
"""GB/s between cards: PCIe 3 with half of its 16 lanes in use, to third-generation NVLink."""
_UNKNOWN_NETWORK = Interval(12.5, 50.0)
"""GB/s of a server: one port of 100 Gb/s to two of 200."""
_HIDDEN = 0.6
"""Share of a step, its backward pass, that an all-reduce can hide behind: an assumption (two thirds of the FLOPs)."""
_ESTIMATE = 0.08
"""By how much the memory estimate is off: allocators round up (benchmarks/2026-11-25_cpu.md has it against runs)."""


@dataclass
class Prediction:
    """A row; every figure is predicted."""

    config: TrainConfig
    memory_gib: Interval
    fits: Optional[bool]
    """None: between, or the device's memory is unknown."""
    step_s: Interval
    p_core: Interval
    samples: int
    """That `total_s` and `energy_j` are of."""
    total_s: Interval
    """The first step to the end: training and evaluations."""
    energy_j: Optional[Interval]
    all_reduce_s: Interval
    steps: int
    evidence: str

    def row(self) -> Dict[str, Any]:
        """For JSON."""
        config = self.config
        return {
            "hardware": config.hardware.name,
            "topology": config.topology.name,
            "precision": config.precision.name,
            "scoring": config.scoring.name,
            "bs": config.bs,
            "samples": self.samples,
            "predicted": True,
            "memory_gib": self.memory_gib.pair(),
            "fits": self.fits,
            "step_s": self.step_s.pair(),
            "p_core": self.p_core.pair(),
            "total_s": self.total_s.pair(),
            "energy_j": None if self.energy_j is None else self.energy_j.pair(),
            "all_reduce_s": self.all_reduce_s.pair(),
            "steps": self.steps,
            "basis": self.evidence,
        }


def all_reduce_time(config: TrainConfig) -> Interval:
    """Seconds of an all-reduce of all gradients: 2 (N - 1) / N of their bytes over the slowest link of a ring.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    ranks = config.topology.world_size
    if ranks == 1:
        return Interval(0.0, 0.0)
    size = count_parameters(config.model) * (2 if config.precision.name == "fp16" else 4) / 1e9
    link = config.hardware.link_gbytes_s
    slowest = _UNKNOWN_LINK if link is None else Interval(0.5 * link, link)
    if config.topology.num_nodes > 1:
        network = config.hardware.network_gbytes_s
        between = _UNKNOWN_NETWORK if network is None else Interval(0.5 * network, network)
        alone = config.topology.devices_per_node == 1
        slowest = between if alone else Interval(min(slowest.low, between.low), min(slowest.high, between.high))
    return slowest.over(2.0 * (ranks - 1) / ranks * size)


def predict(config: TrainConfig, speed: RankSpeed, work: Workload, data: str, samples: int) -> Prediction:
    """Predict a run.

    Args:
        config: the run's.
        speed: of one of its ranks.
        work: of its steps.
        data: what its lengths rest on.
        samples: that it trains on, at most.
    """
    ranks = config.topology.world_size
    computing = speed.seconds(work.slowest)
    exchange = all_reduce_time(config)
    # At best it is done beside the backward pass, at worst behind it.
    seen = Interval(max(0.0, exchange.low - _HIDDEN * computing.low), exchange.high)
    compute = computing + seen
    step = Interval(compute.low * (1.0 + speed.waiting.low), compute.high * (1.0 + speed.waiting.high))
    steps = work.steps()
    evaluations = speed.seconds(work.evaluation / ranks) * work.evaluations(steps)
    total = step * steps + evaluations
    cards = None if speed.power_w is None else speed.power_w * ranks
    guess = estimate_memory(config, work.lengths, 0.0, saves_attention_probs(config)).total
    alike = config.topology.devices_per_node if config.hardware.accelerator == "cpu" else 1  # ranks in one memory
    memory = (Interval(guess, guess).widened(_ESTIMATE) + speed.base) * (alike / _GIB)
    there = config.hardware.memory_gib
    return Prediction(
        config,
        memory,
        None if there is None or memory.low <= there < memory.high else memory.high <= there,
        step,
        compute.over(config.global_batch),
        samples,
        total,
        None if cards is None else Interval(cards.low * total.low, cards.high * total.high),
        exchange,
        steps,
        f"{speed.evidence}; {data}",
    )
