"""Schema of the configuration: every key with its type, ranges and choices. Values are in conf/.

Dataclasses, so that OmegaConf checks the types and mypy checks their use.
Python 3.8 and OmegaConf both need the `typing` spellings here.

A run folder stores a hash of its configuration, by which it is found and resumed. A plain field belongs to the hash and
exists since 0.2.0; see `key` for others.
"""

import math
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from omegaconf import MISSING

from lit_glm.metrics.registry import OBJECTIVES


def key(default: Any, allowed: Any = None, **metadata: Any) -> Any:
    """Declare a key.

    Args:
        default: the default value.
        allowed: values that are allowed: a `Range`, or a tuple of choices; None: any of the type.
        metadata: `hashed=False` for a key that decides how a run is executed or described and not what it computes.
            `added=VERSION, neutral=VALUE` for a key that version 0.1.0 did not have: with the neutral value a run
            computes the same as before the key existed, and the key is left out of the hash.
    """
    return field(default=default, metadata={"allowed": allowed, **metadata})


class Range(NamedTuple):
    """Range of a number."""

    contains: Callable[[float], bool]
    description: str
    """What a value must be, such as `at least 1`, for messages."""


def at_least(low: float, high: float = math.inf) -> Range:
    """Return the range from `low` to `high`, both included."""
    upper = "" if high == math.inf else f" and at most {high:g}"
    return Range(lambda value: low <= value <= high, f"at least {low:g}{upper}")


FINITE = Range(lambda value: 0 <= value < math.inf, "a finite number, at least 0")
SECONDS = Range(lambda value: 0 < value <= 1e8, "a number of seconds above 0, at most 1e8 (three years)")
POSITIVE = Range(lambda value: 0 < value < math.inf, "a finite number above 0")
SHARE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
COUNT = at_least(1)
SEED = at_least(0, 2**32 - 1)


@dataclass
class HardwareConfig:
    """Device type: its runtime, its capabilities and its name in reports."""

    name: str = MISSING
    vendor: str = ""
    product_name: str = ""
    device_name_pattern: str = ""
    server: str = ""
    accelerator: str = "cpu"
    runtime: str = "auto"
    runtimes: List[str] = field(default_factory=list)
    _target_: Optional[str] = None
    env: Dict[str, str] = field(default_factory=dict)
    memory_gib: Optional[float] = key(None, POSITIVE)
    precisions: List[str] = field(default_factory=lambda: ["fp32", "amp", "fp16", "bf16"])
    peak_tflops: Dict[str, Optional[float]] = field(default_factory=dict)
    source: str = ""
    gelu: str = "tanh"
    network: str = ""
    link_gbytes_s: Optional[float] = key(None, POSITIVE, hashed=False)
    network_gbytes_s: Optional[float] = key(None, POSITIVE, hashed=False)
    power_w: Optional[float] = key(None, POSITIVE, hashed=False)
    monitor_interval_s: float = key(5.0, POSITIVE, hashed=False)


@dataclass
class TopologyConfig:
    """Number of nodes and of devices per node."""

    num_nodes: int = key(1, COUNT)
    devices_per_node: int = key(1, COUNT)

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.num_nodes * self.devices_per_node

    @property
    def name(self) -> str:
        """Name as in the published table, such as `2x8`."""
        return f"{self.num_nodes}x{self.devices_per_node}"


@dataclass
class LossScaleConfig:
    """Dynamic loss scaling as published (FlagPerf's DynamicLossScaler)."""

    initial: float = key(65536.0, POSITIVE)
    window: int = key(1000, COUNT)
    hysteresis: int = key(2, COUNT)
    minimum: float = key(1.0, POSITIVE)


@dataclass
class PrecisionConfig:
    """Numerical precision of the model."""

    name: str = key("fp32", ("fp32", "amp", "fp16", "bf16"))
    tf32: bool = False
    loss_scale: Optional[LossScaleConfig] = None


@dataclass
class ModelConfig:
    """Architecture and initial weights of GLM."""

    name: str = "glm_large"
    num_layers: int = key(24, COUNT)
    hidden_size: int = key(1024, COUNT)
    num_attention_heads: int = key(16, COUNT)
    vocab_size: int = key(30592, COUNT)
    max_sequence_length: int = key(512, COUNT)
    hidden_dropout: float = key(0.1, SHARE)
    attention_dropout: float = key(0.1, SHARE)
    gelu: str = key("tanh", ("tanh", "erf"))
    init_std: float = key(0.02, POSITIVE)
    attention: str = key("auto", ("auto", "fused", "matmul"))
    compile: bool = key(False, added="0.2.0", neutral=False)
    activation_checkpointing: bool = False
    init_checkpoint: Optional[str] = None


@dataclass
class SyntheticConfig:
    """Size and seed of the generated corpus."""

    seed: int = key(0, SEED)
    num_train: int = key(20000, COUNT)
    num_eval: int = key(500, COUNT)
    lengths: str = key("short", ("short", "record"), added="0.2.0", neutral="short")
    """`short`, or `record`: sequence lengths as in real news."""
    max_seq_lengths: Dict[str, int] = field(default_factory=dict, metadata={"hashed": False})
    """`data.max_seq_length` for each value of `lengths`."""


@dataclass
class DataConfig:
    """Data files and how they are loaded."""

    name: str = "record"
    raw_dir: Optional[str] = None
    vocab_file: Optional[str] = None
    out_dir: str = "data/record"
    train_file: str = ""
    eval_file: str = ""
    max_seq_length: int = key(512, at_least(8))
    num_workers: int = key(0, at_least(0))
    pad_to: Optional[int] = key(None, at_least(8), added="0.2.0", neutral=None)
    cache_dir: Optional[str] = key(None, hashed=False)
    balance_ranks: bool = False
    shuffle_seed: int = key(0, SEED)
    longest_first: bool = False
    synthetic: Optional[SyntheticConfig] = None


@dataclass
class ScoringConfig:
    """How the candidates of an example are scored."""

    name: str = key("shared_context", ("shared_context", "published"))
    activation_checkpointing: bool = False
    balance_ranks: bool = True


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = key(1e-5, FINITE)
    weight_decay: float = key(0.1, FINITE)
    beta1: float = key(0.9, SHARE)
    beta2: float = key(0.999, SHARE)
    eps: float = key(1e-8, POSITIVE)
    clip_grad: float = key(1.0, POSITIVE)
    warmup: float = key(0.1, at_least(0, 1))
    lr_decay_iters: int = key(4338, COUNT)
    lr_decay_ratio: float = key(0.1, at_least(0, 1))
    gradient_accumulation_steps: int = key(1, COUNT)


@dataclass
class RunConfig:
    """Evaluation, checkpoints, limits and timeouts of a run."""

    max_samples: int = key(5553080, COUNT)
    max_steps: Optional[int] = key(None, COUNT)
    target_accuracy: float = key(0.8, FINITE)
    eval_interval_samples: int = key(19200, COUNT)
    eval_start_samples: int = key(100, at_least(0))
    evaluate: bool = True
    resume: Optional[str] = key(None, hashed=False)
    overwrite: bool = key(False, hashed=False)
    checkpoint_interval_steps: Optional[int] = key(1000, COUNT)
    max_skipped_steps: int = key(100, COUNT)
    stall_timeout_s: float = key(1200.0, SECONDS, hashed=False)
    rendezvous_timeout_s: float = key(300.0, SECONDS, hashed=False)
    shutdown_timeout_s: float = key(120.0, SECONDS, hashed=False)


@dataclass
class SweepConfig:
    """Options of a sweep (Hydra multirun)."""

    skip_done: bool = key(True, hashed=False)
    objective: str = key("acc", OBJECTIVES, hashed=False)


@dataclass
class ReportConfig:
    """Machine information that cannot be detected, for environment.json; null: use what the system reports."""

    machine: Optional[str] = key(None, hashed=False)
    device_name: Optional[str] = key(None, hashed=False)
    network: Optional[str] = key(None, hashed=False)
    driver: Optional[str] = key(None, hashed=False)
    image: Optional[str] = key(None, hashed=False)


@dataclass
class TrainConfig:
    """The whole configuration of `train` and `evaluate`."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    logger: Dict[str, Any] = field(default_factory=dict)
    callbacks: Dict[str, Any] = field(default_factory=dict)
    bs: int = key(4, COUNT)
    eval_bs: int = key(4, COUNT)
    lr: float = key(1e-5, FINITE)
    seed: int = key(4096, SEED)
    fix_hp_source: str = "none"

    def __post_init__(self) -> None:
        """Set `lr` to `optimizer.lr`, so that the reported learning rate is the one used in training.

        A logger or callback that is null, as by `logger.csv=null`, is left out.
        """
        self.lr = self.optimizer.lr
        self.logger = {name: entry for name, entry in self.logger.items() if entry is not None}
        self.callbacks = {name: entry for name, entry in self.callbacks.items() if entry is not None}

    @property
    def global_batch(self) -> int:
        """Examples per step over all ranks."""
        return self.bs * self.topology.world_size

    @property
    def total_steps(self) -> int:
        """Number of steps until the sample limit or the step limit; the run is shorter if it reaches the target."""
        by_samples = self.run.max_samples // self.global_batch + 1
        return by_samples if self.run.max_steps is None else min(self.run.max_steps, by_samples)

    @property
    def profiled(self) -> bool:
        """Whether a profiler callback is configured; metrics of such a run are not comparable with others."""
        return any(
            str(entry.get("_target_", "")).endswith(("Profile", "ProfilerCallback"))
            for entry in self.callbacks.values()
            if isinstance(entry, dict)
        )

    @property
    def fix_hp(self) -> str:
        """Value of the column `fix_hp` of the published table."""
        return f"bs={self.bs},lr={self.lr:g}"


@dataclass
class PrepareConfig:
    """The configuration of `prepare`."""

    data: DataConfig = field(default_factory=DataConfig)
    scoring: Dict[str, Any] = field(default_factory=dict)


def iter_keys(node: Any, prefix: str = "") -> Iterator[Tuple[str, Any, "Field[Any]"]]:
    """Yield (dotted key, value, field) of every leaf below a configuration dataclass."""
    for entry in fields(node):
        value = getattr(node, entry.name)
        if is_dataclass(value):
            yield from iter_keys(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value, entry


_HERE = Path(__file__).resolve().parent
CONF_DIR = next(
    folder
    for folder in (_HERE.parent / "conf", _HERE.parent.parent.parent / "conf")  # in a wheel, in a checkout
    if (folder / "train.yaml").is_file()
)


def train_config(config: Any, **changes: Any) -> "TrainConfig":
    """Return the part of a command's configuration that `train` has, with some values changed."""
    values = {entry.name: getattr(config, entry.name) for entry in fields(TrainConfig)}
    return TrainConfig(**{**values, **changes})


def range_errors(config: Any) -> List[str]:
    """Return one message per invalid value, with the value and what is allowed."""
    complaints = []
    values = {name: value for name, value, _ in iter_keys(config)}
    for name, value, entry in iter_keys(config):
        allowed = entry.metadata.get("allowed")
        if allowed is None or value is None or (name == "optimizer.lr" and str(value) == str(values.get("lr"))):
            continue  # optimizer.lr equals lr unless it is set: report it once
        if isinstance(allowed, Range):
            if not allowed.contains(value):
                complaints.append(f"{name}={value}: must be {allowed.description}")
        elif value not in allowed:
            complaints.append(f"{name}={value}: must be one of {', '.join(allowed)}")
    heads, hidden = values.get("model.num_attention_heads"), values.get("model.hidden_size")
    if heads and hidden and hidden % heads:
        complaints.append(f"model.hidden_size={hidden}: must be a multiple of model.num_attention_heads={heads}")
    updates, every = values.get("optimizer.lr_decay_iters"), values.get("optimizer.gradient_accumulation_steps")
    if updates and every and updates < every:
        complaints.append(
            f"optimizer.lr_decay_iters={updates}: must be at least optimizer.gradient_accumulation_steps={every}, the "
            "steps of one update: all steps would have the lowest learning rate"
        )
    texts = [(f"hardware.env.{name}", value) for name, value in values.get("hardware.env", {}).items()]
    complaints += [f"{name}={value}: must be text" for name, value in texts if not isinstance(value, str)]
    for group in ("logger", "callbacks"):
        for name, entry in values.get(group, {}).items():
            if not isinstance(entry, dict) or not entry.get("_target_"):
                complaints.append(
                    f"{group}.{name}={entry}: must be a class with its arguments, as {group}.{name}._target_=CLASS; "
                    f"`{group}=NAME` selects a file of conf/{group}/"
                )
    if values.get("data.pad_to") and values.get("scoring.name") == "published":
        complaints.append(f"data.pad_to={values['data.pad_to']}: scoring=published pads as published; leave it null")
    return complaints
