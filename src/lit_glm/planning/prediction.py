"""Prediction of a run: cost model of its device (from measured runs, published rows or peaks), workload and links."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from lit_glm.atomic_files import read_csv_rows
from lit_glm.config.schema import DataConfig, ModelConfig, TrainConfig
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.data.synthetic import ensure_synthetic_data
from lit_glm.errors import InputError
from lit_glm.hardware.env import hardware_file
from lit_glm.metrics.flops import peak_key, published_flops
from lit_glm.metrics.memory_estimate import count_parameters, estimate_memory
from lit_glm.metrics.registry import METRICS
from lit_glm.planning.workload import Workload
from lit_glm.runs.job_spec import JOB_FILE, read_run_config
from lit_glm.runs.result import read_result, was_contended
from lit_glm.runs.run_writer import STEP_COLUMNS, is_intact


@dataclass(frozen=True)
class Interval:
    """Interval from low to high, both >= 0."""

    low: float
    high: float

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Interval":
        return Interval(self.low * factor, self.high * factor)

    def over(self, amount: float) -> "Interval":
        """Divide an amount by this interval."""
        return Interval(amount / self.high, amount / self.low)

    def widened(self, share: float) -> "Interval":
        """Widen the interval on both sides by a share."""
        return Interval(self.low / (1.0 + share), self.high * (1.0 + share))

    def pair(self) -> List[float]:
        """Return [low, high], for JSON."""
        return [self.low, self.high]

    def text(self, digits: int = 3) -> str:
        """Format as `4.1-5.2`, or as one number if both are the same at that precision."""
        low, high = f"{self.low:.{digits}g}", f"{self.high:.{digits}g}"
        return low if low == high else f"{low}-{high}"


def hull(values: List[float]) -> Interval:
    """Return the interval from the lowest to the highest value."""
    return Interval(min(values), max(values))


_MAX_STEPS = 400
_UNKNOWN_EFFICIENCY = Interval(0.05, 0.55)
"""Share of the peak that such a model reaches, if nothing is known about the device: from fp32 on small devices to well
tuned half precision (Chowdhery et al. 2022, PaLM, table 3, lists 0.21 to 0.46 for large models)."""
_UNKNOWN_WAITING = Interval(0.0, 0.05)
"""Waiting time relative to compute time: an assumption."""
_OTHER_SCORING = Interval(0.5, 2.0)
"""Ratio between the efficiencies of the two scorings on the same device: an assumption."""
_SMALL_MODEL = 0.02
"""Factor on the lowest efficiency for a model with less than half of GLM-Large's parameters, whose kernels may take
less time than their launch: an assumption."""
_PUBLISHED_CANDIDATES = 10.0
"""Candidate slots per example of the published training: a batch is padded to its most candidates, at most ten."""
_DAY_TO_DAY = 0.05
"""Variation between two devices and between two days: an assumption."""
_GIB = 2.0**30
_LEAST_SPREAD = 0.02
"""Least standard deviation of the work of steps, relative to its mean, from which overhead and rate are separated."""
_UNKNOWN_BASE = {"cpu": Interval(0.35 * _GIB, 0.75 * _GIB)}
_DEVICE_BASE = Interval(0.3 * _GIB, 2.5 * _GIB)
"""Memory in addition to weights, optimizer and activations: Python with torch; context and libraries of a device.
An assumption, until a run has measured it."""
_UNKNOWN_LINK = Interval(8.0, 300.0)
"""GB/s between devices: PCIe 3 with half of its 16 lanes in use, to third-generation NVLink."""
_UNKNOWN_NETWORK = Interval(12.5, 50.0)
"""GB/s of a server: from one port of 100 Gb/s to two of 200 Gb/s."""
_HIDDEN = 0.6
"""Share of a step, its backward pass, that can overlap with an all-reduce: an assumption (two thirds of the FLOPs)."""
_ESTIMATE = 0.08
"""Error of the memory estimate: allocators round up (benchmarks/2026-11-25_cpu.md compares it with runs)."""


@dataclass(frozen=True)
class LinearCostModel:
    """Linear cost model: seconds per step = overhead + FLOPs / rate."""

    overhead: float
    """Seconds that do not depend on the FLOPs: optimizer update, calls."""
    rate: float


@dataclass
class RankSpeed:
    """Cost model of one rank."""

    cost_models: List[LinearCostModel]
    """Possible cost models; the truth is assumed to lie between them."""
    wait_ratio: Interval
    """Waiting for data and bookkeeping, relative to compute time."""
    evidence: str
    power_w: Optional[Interval] = None
    """Power of one device."""
    base: Interval = _DEVICE_BASE
    """Bytes in use in addition to the memory estimate."""
    measured_all_reduce: Interval = Interval(0.0, 0.0)
    """All-reduce of a step that the cost models contain already, as that of the runs they were fitted to."""

    def seconds(self, flops: float) -> Interval:
        """Predict the seconds of a step from its FLOPs."""
        return hull([line.overhead + flops / line.rate for line in self.cost_models]).widened(_DAY_TO_DAY)


def _bounding_models(rates: Interval) -> List[LinearCostModel]:
    return [LinearCostModel(0.0, rates.low), LinearCostModel(0.0, rates.high)]


@dataclass
class MeasuredRun:
    """Measured run that `plan` learns from, without its first steps."""

    path: Path
    config: TrainConfig
    result: Dict[str, Any]
    flops: Any
    """[steps] FLOPs of the slowest rank."""
    compute: Any
    """[steps] compute seconds."""
    wait_ratio: float
    """Waiting for data and bookkeeping, relative to compute time."""
    base: Optional[float]
    """Bytes in use in addition to the memory estimate; None: unknown."""

    @classmethod
    def read(cls, path: Path) -> "MeasuredRun":
        """Read a run folder.

        Raises:
            InputError: if it is not a run folder, or has too few steps.
        """
        if not (path / JOB_FILE).is_file():
            raise InputError(f"plan.runs={path}: not a run folder (no {JOB_FILE})")
        config, result = read_run_config(path), read_result(path) or {}
        rows = read_csv_rows(path / "steps.csv", STEP_COLUMNS) if (path / "steps.csv").is_file() else []
        first = max(3, len(rows) // 10)  # the first steps touch memory and start kernels for the first time
        usable = [row for row in rows if is_intact(row) and int(row["step"]) > first and float(row["compute_s"]) > 0.0]
        if len(usable) < 5:
            raise InputError(f"plan.runs={path}: has {len(rows)} steps, too few to learn from (minimum: {first + 5})")
        usable = usable[:_MAX_STEPS]
        if config.data.synthetic is not None:
            ensure_synthetic_data(config.data)
        split = open_dataset(config.data.train_file, False, config.data.cache_dir)
        work = Workload(config, split, None)
        flops = np.array([float(work.counter.flops_by_rank(int(row["step"])).max()) for row in usable])
        compute, step = (np.array([float(row[name]) for row in usable]) for name in ("compute_s", "step_s"))
        actual, ranks = METRICS["mem_actual_gib"].value(result), config.topology.world_size
        estimate = estimate_memory(config, work.lengths, 0.0, saves_attention_probs(config)).total
        base = None if not actual or ranks > 1 else max(0.0, actual * _GIB - estimate)
        return cls(path, config, result, flops, compute, float(np.median(step) / np.median(compute)) - 1.0, base)

    @property
    def is_usable(self) -> bool:
        """Whether the run was a measurement of its device: not simulated, profiled, or computed on the CPU instead."""
        return not any(self.result.get(mark) for mark in ("simulated", "profiled", "computed_on_cpu"))

    def fit_cost_models(self) -> List[LinearCostModel]:
        """Fit linear cost models: to all steps, without outliers, and by least squares if well conditioned.

        Occasional slow steps may not be a property of the device; the range covers both cases.
        """
        flops, compute = self.flops, self.compute
        everything = LinearCostModel(0.0, float(flops.sum() / compute.sum()))
        for _ in range(3):
            off = compute - flops * (compute.sum() / flops.sum())
            kept = np.abs(off - np.median(off)) <= 4.0 * np.median(np.abs(off - np.median(off))) + 1e-9
            flops, compute = flops[kept], compute[kept]
        proportional = LinearCostModel(0.0, float(flops.sum() / compute.sum()))
        unit = float(flops.mean())  # so that both columns are of one magnitude
        design = np.stack([np.ones(len(flops)), flops / unit], axis=1)
        overhead, at_mean = np.linalg.lstsq(design, compute, rcond=None)[0]
        if float(flops.std()) < _LEAST_SPREAD * unit or at_mean <= 0.25 * float(compute.mean()):
            # The FLOPs vary too little, or explain too little of the time: the rate may be anything up to the peak.
            peak = self.config.hardware.peak_tflops.get(peak_key(self.config, has_tf32=True))
            fastest = 20.0 * proportional.rate if peak is None else max(proportional.rate, peak * 1e12)
            return [everything, proportional, LinearCostModel(float(compute.mean()) - unit / fastest, fastest)]
        if overhead <= 1e-6 * float(compute.mean()):
            return [everything, proportional]
        return [everything, proportional, LinearCostModel(float(overhead), unit / float(at_mean))]


def saves_attention_probs(config: TrainConfig) -> bool:
    """Return whether attention saves its probabilities for backward: matmul attention does, fused kernels do not."""
    import torch

    from lit_glm.model.attention import choose_implementation

    place = torch.device("cpu" if config.hardware.accelerator == "cpu" else "meta")
    return choose_implementation(config.model.attention, place, config.model.attention_dropout) == "matmul"


def ignored_runs(runs: List[MeasuredRun], configs: List[Any]) -> List[str]:
    """List the runs that no configuration can learn from, with the reason."""
    messages = [f"{run.path}: ignored: simulated, profiled or computed on the CPU" for run in runs if not run.is_usable]
    for run in runs:
        if run.is_usable and not any(is_same_device_type(run.config, config) for config in configs):
            setting = f"{run.config.hardware.name} in {run.config.precision.name}"
            messages.append(f"{run.path}: ignored: measured on {setting}{' (TF32)' * run.config.precision.tf32}")
    return messages


def rank_speed(config: TrainConfig, runs: List[MeasuredRun], published: List[Dict[str, Any]]) -> RankSpeed:
    """Build the cost model of a rank for a configuration."""
    matching = [run for run in runs if run.is_usable and is_same_device_type(run.config, config)]
    if matching:
        return _speed_from_runs(config, matching)
    peak = config.hardware.peak_tflops.get(peak_key(config, has_tf32=True))
    rows = [row for row in published if _is_published_row_of(row, config) and row.get("p_core")]
    power = None if config.hardware.power_w is None else Interval(0.4, 1.0) * config.hardware.power_w
    base = _UNKNOWN_BASE.get(config.hardware.accelerator, _DEVICE_BASE)
    is_small = count_parameters(config.model) < 0.5 * count_parameters(ModelConfig())
    if rows:
        fewest = min(_num_ranks(row) for row in rows)
        rows = [row for row in rows if _num_ranks(row) == fewest]
        # FLOPs per sample of the published workload, with which p_core was measured.
        per_sample = float(published_flops(ModelConfig(), _PUBLISHED_CANDIDATES, DataConfig().max_seq_length))
        rate = hull([per_sample * row["p_core"] / fewest for row in rows])
        basis = f"published p_core of {config.hardware.name} {rows[0]['topology']} ({rows[0]['fix_hp']})"
        if rows[0]["tf32"] and not config.precision.tf32:
            basis += ", measured with TF32 (precision.tf32=true)"
            plain, rounded = (config.hardware.peak_tflops.get(name) for name in ("fp32", "tf32"))
            rate = Interval(rate.low * (plain / rounded if plain and rounded else 0.1), rate.high)
        if config.scoring.name != "published":
            rate = Interval(rate.low * _OTHER_SCORING.low, rate.high * _OTHER_SCORING.high)
            basis += ", with the other scoring"
        if is_small:
            rate = Interval(rate.low * _SMALL_MODEL, rate.high)
            basis += ", of a larger model"
        return RankSpeed(_bounding_models(rate), _UNKNOWN_WAITING, basis, power, base)
    if not peak:
        name = config.hardware.name
        raise InputError(
            f"hardware={name}: its speed cannot be predicted: no peak for {config.precision.name} in "
            f"{hardware_file(name)} and no published p_core; give a run on this device with plan.runs=RUN_DIR"
        )
    share = _UNKNOWN_EFFICIENCY
    basis = f"{share.low:.0%} to {share.high:.0%} of the peak (no measurement of this device)"
    if is_small:
        share = Interval(share.low * _SMALL_MODEL, share.high)
        basis += ", of a larger model"
    return RankSpeed(_bounding_models(share * (peak * 1e12)), _UNKNOWN_WAITING, basis, power, base)


def _speed_from_runs(config: TrainConfig, runs: List[MeasuredRun]) -> RankSpeed:
    same_scoring = [run for run in runs if run.config.scoring.name == config.scoring.name]
    # A run of the same topology shows best how its ranks slow each other down.
    chosen = [run for run in same_scoring if run.config.topology == config.topology] or same_scoring or runs
    share = config.topology.devices_per_node if config.hardware.accelerator == "cpu" else 1  # ranks share the cores
    factors = (1.0,) if same_scoring else (_OTHER_SCORING.low, _OTHER_SCORING.high)
    cost_models = []
    for run in chosen:
        run_share = run.config.topology.devices_per_node if config.hardware.accelerator == "cpu" else 1
        # The overhead of a step scales with the parameters (update) or with the layers (calls).
        scales = (
            count_parameters(config.model) / count_parameters(run.config.model),
            (config.model.num_layers + 1) / (run.config.model.num_layers + 1),
        )
        factor = share / run_share * _recomputation(config) / _recomputation(run.config)
        for line in run.fit_cost_models():
            overheads = {line.overhead * factor * scale for scale in scales}
            cost_models += [
                LinearCostModel(overhead, line.rate / factor * f) for overhead in overheads for f in factors
            ]
    names = [run.path.name for run in chosen]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    basis = f"{len(chosen)} run{'s' * (len(chosen) > 1)} on {config.hardware.name}: {listed}"
    if not same_scoring:
        basis += ", with the other scoring"
    if any(_recomputation(run.config) != _recomputation(config) for run in chosen):
        kind = "activation checkpointing" if config.model.activation_checkpointing else "no activation checkpointing"
        basis += f", converted to {kind}"
    if any(was_contended(run.result) for run in chosen):
        basis += ", measured beside other processes"
    power = [
        float(run.result["power_mean_w"]) / _power_units(run.config) for run in chosen if run.result.get("power_mean_w")
    ]
    bases = [run.base for run in chosen if run.base is not None]
    all_reduces = [all_reduce_time(run.config) for run in chosen]
    unknown = _UNKNOWN_BASE.get(config.hardware.accelerator, _DEVICE_BASE)
    return RankSpeed(
        cost_models,
        hull([max(0.0, run.wait_ratio) for run in chosen]),
        basis,
        hull(power).widened(_DAY_TO_DAY) if power else None,
        hull(bases).widened(_DAY_TO_DAY) if bases else unknown,
        Interval(min(time.low for time in all_reduces), min(time.high for time in all_reduces)),
    )


def _recomputation(config: TrainConfig) -> float:
    """Return the time of a step relative to that without activation checkpointing, which repeats the forward pass."""
    return 4.0 / 3.0 if config.model.activation_checkpointing else 1.0


def _power_units(config: TrainConfig) -> int:
    """Return the number of units whose power is measured: devices, but nodes on CPUs, which their ranks share."""
    return config.topology.num_nodes if config.hardware.accelerator == "cpu" else config.topology.world_size


def is_same_device_type(one: TrainConfig, other: TrainConfig) -> bool:
    """Return whether two configurations have the same device type and arithmetic, so that one predicts the other."""
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


@dataclass
class Prediction:
    """Predicted metrics of one run."""

    config: TrainConfig
    memory_gib: Interval
    fits: Optional[bool]
    """Whether the run fits into the device's memory; None if the prediction is undecided, or the memory unknown."""
    step_s: Interval
    p_core: Interval
    samples: int
    """Number of samples that `total_s` and `energy_j` refer to."""
    total_s: Interval
    """Predicted seconds of training and evaluations."""
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
    """Predict a run."""
    ranks = config.topology.world_size
    computing = speed.seconds(work.slowest_rank_flops)
    all_reduce, measured = all_reduce_time(config), speed.measured_all_reduce
    # At best it overlaps with the backward pass, at worst it follows it.
    more = Interval(max(0.0, all_reduce.low - measured.low), max(0.0, all_reduce.high - measured.high))
    exposed = Interval(max(0.0, more.low - _HIDDEN * computing.low), more.high)
    compute = computing + exposed
    step = Interval(compute.low * (1.0 + speed.wait_ratio.low), compute.high * (1.0 + speed.wait_ratio.high))
    steps = work.steps()
    evaluations = speed.seconds(work.evaluation_flops / ranks) * work.evaluations(steps)
    total = step * steps + evaluations
    power_w = None if speed.power_w is None else speed.power_w * _power_units(config)
    estimate = estimate_memory(config, work.lengths, 0.0, saves_attention_probs(config)).total
    ranks_sharing_memory = config.topology.devices_per_node if config.hardware.accelerator == "cpu" else 1
    memory = (Interval(estimate, estimate).widened(_ESTIMATE) + speed.base) * (ranks_sharing_memory / _GIB)
    device_gib = config.hardware.memory_gib
    return Prediction(
        config,
        memory,
        None if device_gib is None or memory.low <= device_gib < memory.high else memory.high <= device_gib,
        step,
        compute.over(config.global_batch),
        samples,
        total,
        None if power_w is None else Interval(power_w.low * total.low, power_w.high * total.high),
        all_reduce,
        steps,
        f"{speed.evidence}; {data}",
    )
