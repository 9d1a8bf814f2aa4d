"""Prediction of a run from its workload, cost model and links: memory, step time, throughput, total time, energy."""

from dataclasses import dataclass
from typing import Any, Dict, Optional

from lit_glm.config.schema import TrainConfig
from lit_glm.metrics.memory_estimate import count_parameters, estimate_memory
from lit_glm.planning.cost_model import Interval, RankSpeed, saves_attention_probs
from lit_glm.planning.workload import Workload

_GIB = 2.0**30
_UNKNOWN_LINK = Interval(8.0, 300.0)
"""GB/s between devices: PCIe 3 with half of its 16 lanes in use, to third-generation NVLink."""
_UNKNOWN_NETWORK = Interval(12.5, 50.0)
"""GB/s of a server: from one port of 100 Gb/s to two of 200 Gb/s."""
_HIDDEN = 0.6
"""Share of a step, its backward pass, that can overlap with an all-reduce: an assumption (two thirds of the FLOPs)."""
_ESTIMATE = 0.08
"""Error of the memory estimate: allocators round up (benchmarks/2026-11-25_cpu.md compares it with runs)."""


@dataclass
class Prediction:
    """Predicted metrics of one run."""

    config: TrainConfig
    memory_gib: Interval
    fits: Optional[bool]
    """None: memory_gib contains the device's memory, or that is unknown."""
    step_s: Interval
    p_core: Interval
    samples: int
    """Number of samples that `total_s` and `energy_j` refer to."""
    total_s: Interval
    """From the first step to the end: training and evaluations."""
    energy_j: Optional[Interval]
    all_reduce_s: Interval
    steps: int
    evidence: str

    def row(self) -> Dict[str, Any]:
        """Return the prediction as a dict for JSON."""
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
    """Predict the seconds of an all-reduce of all gradients: 2 (N - 1) / N of their bytes over a ring's slowest link.

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
        config: run configuration.
        speed: cost model of one of its ranks.
        work: workload of its steps.
        data: evidence for the lengths of its examples.
        samples: maximum number of training samples.
    """
    ranks = config.topology.world_size
    computing = speed.seconds(work.slowest)
    exchange = all_reduce_time(config)
    # At best it overlaps with the backward pass, at worst it follows it.
    seen = Interval(max(0.0, exchange.low - _HIDDEN * computing.low), exchange.high)
    compute = computing + seen
    step = Interval(compute.low * (1.0 + speed.waiting.low), compute.high * (1.0 + speed.waiting.high))
    steps = work.steps()
    evaluations = speed.seconds(work.evaluation / ranks) * work.evaluations(steps)
    total = step * steps + evaluations
    cards = None if speed.power_w is None else speed.power_w * ranks
    guess = estimate_memory(config, work.lengths, 0.0, saves_attention_probs(config)).total
    alike = config.topology.devices_per_node if config.hardware.accelerator == "cpu" else 1  # ranks share memory
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
