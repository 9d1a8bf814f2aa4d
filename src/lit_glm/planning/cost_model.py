"""How fast a card would be: from runs on such cards, else from the chip's published rows, else a share of its peak."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from lit_glm.config.schema import TrainConfig
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.errors import InputError
from lit_glm.metrics.memory_estimate import count_parameters, estimate_memory
from lit_glm.planning.workload import Workload
from lit_glm.runs.job_spec import JOB_FILE, JobSpec
from lit_glm.runs.result import read_result
from lit_glm.runs.run_writer import STEP_COLUMNS, read_csv_rows


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


_MOST_STEPS = 400
_UNKNOWN_EFFICIENCY = Interval(0.05, 0.55)
"""Share of a peak that such a model reaches, where nothing is known of the chip: from fp32 work on small cards to well
tuned half precision (Chowdhery et al. 2022, PaLM, table 3, lists 0.21 to 0.46 for large models)."""
_UNKNOWN_WAITING = Interval(0.0, 0.05)
"""Over the computation: an assumption."""
_OTHER_SCORING = Interval(0.5, 2.0)
"""By how much the efficiency of one scoring may differ from the other's on the same chip: an assumption."""
_DAY_TO_DAY = 0.05
"""Between two cards, and two days: an assumption."""
_GIB = 2.0**30
_UNKNOWN_BASE = {"cpu": Interval(0.35 * _GIB, 0.75 * _GIB)}
_CARD_BASE = Interval(0.3 * _GIB, 2.5 * _GIB)
"""Memory beside weights, optimizer and activations: an interpreter with torch; a card's context and libraries.
An assumption, until a run has measured it."""


@dataclass(frozen=True)
class LinearCostModel:
    """Seconds a step = overhead + FLOPs / rate."""

    overhead: float
    """Whatever its length: the update, calls."""
    rate: float


@dataclass
class RankSpeed:
    """Of one rank."""

    lines: List[LinearCostModel]
    """What may hold: the truth is taken to lie between them."""
    waiting: Interval
    """Waiting for data and bookkeeping, over the computation."""
    evidence: str
    power_w: Optional[Interval] = None
    """A card's."""
    base: Interval = _CARD_BASE
    """Bytes in use beside what is estimated."""

    def seconds(self, flops: float) -> Interval:
        """Of a step of so many FLOPs."""
        return hull([line.overhead + flops / line.rate for line in self.lines]).widened(_DAY_TO_DAY)


def _bounding_models(rates: Interval) -> List[LinearCostModel]:
    return [LinearCostModel(0.0, rates.low), LinearCostModel(0.0, rates.high)]


@dataclass
class MeasuredRun:
    """A run as plan learns from it; of its steps those behind the first ones."""

    path: Path
    config: TrainConfig
    result: Dict[str, Any]
    flops: Any
    """[steps] of the slowest rank."""
    compute: Any
    """[steps] seconds."""
    waiting: float
    base: Optional[float]

    @classmethod
    def read(cls, path: Path) -> "MeasuredRun":
        """Read a run folder.

        Raises:
            InputError: if it is none, or has no steps to learn from.
        """
        if not (path / JOB_FILE).is_file():
            raise InputError(f"plan.runs={path}: is no run folder (it has no {JOB_FILE})")
        config, result = JobSpec.read(path).config, read_result(path) or {}
        rows = read_csv_rows(path / "steps.csv", STEP_COLUMNS) if (path / "steps.csv").is_file() else []
        first = max(3, len(rows) // 10)  # the first steps touch memory and start kernels for the first time
        rows = rows[: first + _MOST_STEPS]
        if len(rows) - first < 5:
            raise InputError(f"plan.runs={path}: has {len(rows)} steps, too few to learn from (at least {first + 5})")
        split = open_dataset(config.data.train_file, False, config.data.cache_dir)
        work = Workload(config, split, None)
        flops = np.array([float(work.counter.flops_by_rank(step).max()) for step in range(first + 1, len(rows) + 1)])
        compute, step = (np.array([float(row[name]) for row in rows])[first:] for name in ("compute_s", "step_s"))
        actual, ranks = result.get("mem_actual_gib"), config.topology.world_size
        guess = estimate_memory(config, work.lengths, 0.0, saves_attention_probs(config)).total
        base = None if not actual or ranks > 1 else max(0.0, float(actual) * _GIB - guess)
        return cls(path, config, result, flops, compute, float(np.median(step) / np.median(compute)) - 1.0, base)

    @property
    def plain(self) -> bool:
        """Whether its figures are those of a run left to itself on the chip that it names."""
        return not any(self.result.get(mark) for mark in ("simulated", "profiled"))

    def lines(self) -> List[LinearCostModel]:
        """Its steps as lines: all of them, then without far outliers, then by least squares where that says something.

        What came in between now and then may be no property of the chip; the range holds both.
        """
        flops, compute = self.flops, self.compute
        everything = LinearCostModel(0.0, float(flops.sum() / compute.sum()))
        for _ in range(3):
            off = compute - flops * (compute.sum() / flops.sum())
            kept = np.abs(off - np.median(off)) <= 4.0 * np.median(np.abs(off - np.median(off))) + 1e-9
            flops, compute = flops[kept], compute[kept]
        whole = LinearCostModel(0.0, float(flops.sum() / compute.sum()))
        design = np.stack([np.ones(len(flops)), flops], axis=1)
        overhead, slope = np.linalg.lstsq(design, compute, rcond=None)[0]
        # Lengths that differ too little cannot tell the two apart.
        if overhead <= 0 or slope <= 0.25 / whole.rate:
            return [everything, whole]
        return [everything, whole, LinearCostModel(float(overhead), float(1.0 / slope))]


def saves_attention_probs(config: TrainConfig) -> bool:
    """Whether attention keeps its probabilities for the backward pass: products do, fused kernels not."""
    import torch

    from lit_glm.model.attention import choose_implementation

    place = torch.device("cpu" if config.hardware.accelerator == "cpu" else "meta")
    return choose_implementation(config.model.attention, place, config.model.attention_dropout) == "matmul"


def ignored_runs(runs: List[MeasuredRun], configs: List[Any]) -> List[str]:
    """Runs that no configuration can learn from, and why."""
    said = [f"{run.path}: not learnt from: simulated or profiled" for run in runs if not run.plain]
    for run in runs:
        if run.plain and not any(same_chip(run.config, config) for config in configs):
            what = f"{run.config.hardware.name} in {run.config.precision.name}"
            said.append(f"{run.path}: not learnt from: it is of {what}{' (TF32)' * run.config.precision.tf32}")
    return said


def rank_speed(
    config: TrainConfig, runs: List[MeasuredRun], published: List[Dict[str, Any]], work: Workload
) -> RankSpeed:
    """What is known of a rank's speed under a configuration.

    Args:
        config: of the run that is predicted.
        runs: to learn from.
        published: rows of conf/published.yaml.
        work: of the configuration.
    """
    own = [run for run in runs if run.plain and same_chip(run.config, config)]
    if own:
        return _speed_from_runs(config, own)
    peak = config.hardware.peak_tflops.get("tf32" if config.precision.tf32 else config.precision.name)
    rows = [row for row in published if _is_published_row_of(row, config) and row.get("p_core")]
    power = None if config.hardware.power_w is None else Interval(0.4, 1.0) * config.hardware.power_w
    base = _UNKNOWN_BASE.get(config.hardware.accelerator, _CARD_BASE)
    if rows:
        fewest = min(_num_ranks(row) for row in rows)
        rows = [row for row in rows if _num_ranks(row) == fewest]
        per_sample = _published_flops_a_sample(config, work)
        rate = hull([per_sample * row["p_core"] / fewest for row in rows])
        basis = f"published p_core of {config.hardware.name} {rows[0]['topology']} ({rows[0]['fix_hp']})"
        if rows[0]["tf32"] and not config.precision.tf32:
            basis += ", which had TF32 on (precision.tf32=true)"
            plain, rounded = (config.hardware.peak_tflops.get(name) for name in ("fp32", "tf32"))
            rate = Interval(rate.low * (plain / rounded if plain and rounded else 0.1), rate.high)
        if config.scoring.name != "published":
            rate = Interval(rate.low * _OTHER_SCORING.low, rate.high * _OTHER_SCORING.high)
            basis += ", of the other scoring"
        return RankSpeed(_bounding_models(rate), _UNKNOWN_WAITING, basis, power, base)
    if not peak:
        name = config.hardware.name
        raise InputError(
            f"hardware={name}: nothing to predict its speed from: no peak for {config.precision.name} in "
            f"conf/hardware/{name}.yaml, no published p_core; give a run on such a card with plan.runs=RUN_DIR"
        )
    basis = (
        f"{_UNKNOWN_EFFICIENCY.low:.0%} to {_UNKNOWN_EFFICIENCY.high:.0%} of the peak, nothing is known of this chip"
    )
    return RankSpeed(_bounding_models(_UNKNOWN_EFFICIENCY * (peak * 1e12)), _UNKNOWN_WAITING, basis, power, base)


def _speed_from_runs(config: TrainConfig, runs: List[MeasuredRun]) -> RankSpeed:
    alike = [run for run in runs if run.config.scoring.name == config.scoring.name]
    chosen = alike or runs
    share = config.topology.devices_per_node if config.hardware.accelerator == "cpu" else 1  # ranks share the cores
    factors = (1.0,) if alike else (_OTHER_SCORING.low, _OTHER_SCORING.high)
    lines = []
    for run in chosen:
        own = run.config.topology.devices_per_node if config.hardware.accelerator == "cpu" else 1
        # What a step costs beside its FLOPs goes with the parameters (the update) or with the layers (calls).
        scales = (
            count_parameters(config.model) / count_parameters(run.config.model),
            (config.model.num_layers + 1) / (run.config.model.num_layers + 1),
        )
        for line in run.lines():
            overheads = {line.overhead * share / own * scale for scale in scales}
            lines += [LinearCostModel(overhead, line.rate * own / share * f) for overhead in overheads for f in factors]
    basis = f"{len(chosen)} run{'s' * (len(chosen) > 1)} on {config.hardware.name}: {chosen[0].path.name}"
    if not alike:
        basis += ", of the other scoring"
    power = [
        float(run.result["power_mean_w"]) / run.config.topology.world_size
        for run in chosen
        if run.result.get("power_mean_w")
    ]
    bases = [run.base for run in chosen if run.base is not None]
    unknown = _UNKNOWN_BASE.get(config.hardware.accelerator, _CARD_BASE)
    return RankSpeed(
        lines,
        hull([max(0.0, run.waiting) for run in chosen]),
        basis,
        hull(power).widened(_DAY_TO_DAY) if power else None,
        hull(bases).widened(_DAY_TO_DAY) if bases else unknown,
    )


def same_chip(one: TrainConfig, other: TrainConfig) -> bool:
    """Whether what one has measured says something of the other's speed."""
    return (one.hardware.name, one.precision.name, one.precision.tf32) == (
        other.hardware.name,
        other.precision.name,
        other.precision.tf32,
    )


def _is_published_row_of(row: Dict[str, Any], config: TrainConfig) -> bool:
    tf32 = config.precision.tf32 or (row["tf32"] and config.precision.name == "fp32")
    return bool(
        row["hardware"] == config.hardware.name and row["precision"] == config.precision.name and tf32 == row["tf32"]
    )


def _num_ranks(row: Dict[str, Any]) -> int:
    nodes, devices = str(row["topology"]).split("x")
    return int(nodes) * int(devices)


def _published_flops_a_sample(config: TrainConfig, work: Workload) -> float:
    """Of the published workload, whatever the configuration scores by: ten sequences where a batch's most are ten."""
    from lit_glm.metrics.flops import published_flops

    most = float(work.lengths.candidates.max())
    return float(published_flops(config.model, most, config.data.max_seq_length))
