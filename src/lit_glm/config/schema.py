"""Schema of the configuration: every key with its type, ranges and choices. Values are in conf/.

Dataclasses, so that OmegaConf checks the types and mypy checks their use.
Python 3.8 and OmegaConf both need the `typing` spellings here.

A run folder stores a hash of its configuration, by which it is found and resumed. A plain field belongs to the hash and
exists since 0.2.0. A key that is added later is declared with `new_in`, which keeps the hashes of older runs valid; a
key that does not change what a run computes is declared with `unhashed`.
"""

import math
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from omegaconf import MISSING

from lit_glm.metrics.registry import OBJECTIVES


def new_in(version: str, default: Any, neutral: Any) -> Any:
    """Declare a key that was added after version 0.2.0.

    Args:
        version: the release that has it first.
        default: the default value.
        neutral: the value with which a run computes the same as before the key existed; it is left out of the hash.
    """
    return field(default=default, metadata={"added": version, "neutral": neutral})


def unhashed(default: Any) -> Any:
    """Declare a key that decides how a run is executed or described and not what it computes."""
    return field(default=default, metadata={"hashed": False})


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
    memory_gib: Optional[float] = None
    precisions: List[str] = field(default_factory=lambda: ["fp32", "amp", "fp16", "bf16"])
    peak_tflops: Dict[str, Optional[float]] = field(default_factory=dict)
    source: str = ""
    gelu: str = "tanh"
    network: str = ""
    link_gbytes_s: Optional[float] = unhashed(None)
    network_gbytes_s: Optional[float] = unhashed(None)
    power_w: Optional[float] = unhashed(None)
    monitor_interval_s: float = unhashed(5.0)


@dataclass
class TopologyConfig:
    """Number of nodes and of devices per node."""

    num_nodes: int = 1
    devices_per_node: int = 1

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

    initial: float = 65536.0
    window: int = 1000
    hysteresis: int = 2
    minimum: float = 1.0


@dataclass
class PrecisionConfig:
    """Numerical precision of the model."""

    name: str = "fp32"
    tf32: bool = False
    loss_scale: Optional[LossScaleConfig] = None


@dataclass
class ModelConfig:
    """Architecture and initial weights of GLM."""

    name: str = "glm_large"
    num_layers: int = 24
    hidden_size: int = 1024
    num_attention_heads: int = 16
    vocab_size: int = 30592
    max_sequence_length: int = 512
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    gelu: str = "tanh"
    init_std: float = 0.02
    attention: str = "auto"
    compile: bool = field(default=False, metadata={"added": "0.2.0", "neutral": False})
    activation_checkpointing: bool = False
    init_checkpoint: Optional[str] = None


@dataclass
class SyntheticConfig:
    """Size and seed of the generated corpus."""

    seed: int = 0
    num_train: int = 20000
    num_eval: int = 500
    lengths: str = field(default="short", metadata={"added": "0.2.0", "neutral": "short"})
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
    max_seq_length: int = 512
    num_workers: int = 0
    pad_to: Optional[int] = field(default=None, metadata={"added": "0.2.0", "neutral": None})
    cache_dir: Optional[str] = unhashed(None)
    balance_ranks: bool = False
    shuffle_seed: int = 0
    longest_first: bool = False
    synthetic: Optional[SyntheticConfig] = None


@dataclass
class ScoringConfig:
    """How the candidates of an example are scored."""

    name: str = "shared_context"
    activation_checkpointing: bool = False
    balance_ranks: bool = True


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    warmup: float = 0.1
    lr_decay_iters: int = 4338
    lr_decay_ratio: float = 0.1
    gradient_accumulation_steps: int = 1


@dataclass
class RunConfig:
    """Evaluation, checkpoints, limits and timeouts of a run."""

    max_samples: int = 5553080
    max_steps: Optional[int] = None
    target_accuracy: float = 0.8
    eval_interval_samples: int = 19200
    eval_start_samples: int = 100
    evaluate: bool = True
    resume: Optional[str] = unhashed(None)
    overwrite: bool = unhashed(False)
    checkpoint_interval_steps: Optional[int] = 1000
    max_skipped_steps: int = 100
    stall_timeout_s: float = unhashed(1200.0)
    rendezvous_timeout_s: float = unhashed(300.0)
    shutdown_timeout_s: float = unhashed(120.0)


@dataclass
class SweepConfig:
    """Options of a sweep (Hydra multirun)."""

    skip_done: bool = unhashed(True)
    objective: str = unhashed("acc")


@dataclass
class ReportConfig:
    """Machine information that cannot be detected, for environment.json; null: use what the system reports."""

    machine: Optional[str] = unhashed(None)
    device_name: Optional[str] = unhashed(None)
    network: Optional[str] = unhashed(None)
    driver: Optional[str] = unhashed(None)
    image: Optional[str] = unhashed(None)


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
    bs: int = 4
    eval_bs: int = 4
    lr: float = 1e-5
    seed: int = 4096
    fix_hp_source: str = "none"

    def __post_init__(self) -> None:
        """Set `lr` to `optimizer.lr`, so that the reported learning rate is the one used in training."""
        self.lr = self.optimizer.lr

    @property
    def global_batch(self) -> int:
        """Examples per step over all ranks."""
        return self.bs * self.topology.world_size

    @property
    def profiled(self) -> bool:
        """Whether a profiler callback is configured; metrics of such a run are not comparable with others."""
        return any(
            str((entry or {}).get("_target_", "")).endswith(("Profile", "ProfilerCallback"))
            for entry in self.callbacks.values()
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


def iter_leaves(node: Any) -> Iterator[Tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf below a configuration dataclass."""
    for key, value, _ in iter_keys(node):
        yield key, value


_HERE = Path(__file__).resolve().parent
CONF_DIR = next(
    folder
    for folder in (_HERE.parent / "conf", _HERE.parent.parent.parent / "conf")  # in a wheel, in a checkout
    if (folder / "train.yaml").is_file()
)


_INF = math.inf
# key -> (lowest, highest); a bound in the second tuple is excluded
_CLOSED: Dict[str, Tuple[float, float]] = {
    "bs": (1, _INF),
    "eval_bs": (1, _INF),
    "seed": (0, 2**32 - 1),
    "topology.num_nodes": (1, _INF),
    "topology.devices_per_node": (1, _INF),
    "model.num_layers": (1, _INF),
    "model.hidden_size": (1, _INF),
    "model.num_attention_heads": (1, _INF),
    "model.vocab_size": (1, _INF),
    "model.max_sequence_length": (1, _INF),
    "data.max_seq_length": (8, _INF),
    "data.num_workers": (0, _INF),
    "data.pad_to": (8, _INF),
    "data.shuffle_seed": (0, 2**32 - 1),
    "data.synthetic.seed": (0, 2**32 - 1),
    "data.synthetic.num_train": (1, _INF),
    "data.synthetic.num_eval": (1, _INF),
    "optimizer.lr_decay_iters": (1, _INF),
    "optimizer.lr_decay_ratio": (0, 1),
    "optimizer.warmup": (0, 1),
    "optimizer.gradient_accumulation_steps": (1, _INF),
    "run.max_samples": (1, _INF),
    "run.max_steps": (1, _INF),
    "run.eval_interval_samples": (1, _INF),
    "run.eval_start_samples": (0, _INF),
    "run.checkpoint_interval_steps": (1, _INF),
    "run.max_skipped_steps": (1, _INF),
    "tune.steps": (4, _INF),
    "precision.loss_scale.window": (1, _INF),
    "precision.loss_scale.hysteresis": (1, _INF),
}
_FINITE: Dict[str, Tuple[float, float]] = {
    "lr": (0, _INF),
    "optimizer.lr": (0, _INF),
    "optimizer.weight_decay": (0, _INF),
    "run.target_accuracy": (0, _INF),
}
_OPEN: Dict[str, Tuple[float, float]] = {
    "model.init_std": (0, _INF),
    "optimizer.eps": (0, _INF),
    "optimizer.clip_grad": (0, _INF),
    "verify.max_minutes": (0, _INF),
    "run.stall_timeout_s": (0, _INF),
    "run.rendezvous_timeout_s": (0, _INF),
    "run.shutdown_timeout_s": (0, _INF),
    "hardware.memory_gib": (0, _INF),
    "hardware.monitor_interval_s": (0, _INF),
    "hardware.link_gbytes_s": (0, _INF),
    "hardware.network_gbytes_s": (0, _INF),
    "hardware.power_w": (0, _INF),
    "tune.max_minutes": (0, _INF),
    "precision.loss_scale.initial": (0, _INF),
    "precision.loss_scale.minimum": (0, _INF),
}
_BELOW_ONE = ("model.hidden_dropout", "model.attention_dropout", "optimizer.beta1", "optimizer.beta2")
_CHOICES: Dict[str, Tuple[str, ...]] = {
    "model.gelu": ("tanh", "erf"),
    "model.attention": ("auto", "fused", "matmul"),
    "precision.name": ("fp32", "amp", "fp16", "bf16"),
    "scoring.name": ("shared_context", "published"),
    "sweep.objective": OBJECTIVES,
    "data.synthetic.lengths": ("short", "record"),
}


def train_config(config: Any, **changes: Any) -> "TrainConfig":
    """Return the part of a command's configuration that `train` has, with some values changed."""
    own = {entry.name: getattr(config, entry.name) for entry in fields(TrainConfig)}
    return TrainConfig(**{**own, **changes})


def range_errors(config: Any) -> List[str]:
    """Return one message per invalid value, with the value and what is allowed."""
    complaints = []
    values = dict(iter_leaves(config))
    for key, value in values.items():
        if value is None or (key == "optimizer.lr" and str(value) == str(values.get("lr"))):
            continue  # optimizer.lr equals lr unless it is set: report it once
        if key in _CLOSED:
            low, high = _CLOSED[key]
            if not low <= value <= high:
                upper = "" if high == _INF else f" and at most {high:g}"
                complaints.append(f"{key}={value}: must be at least {low:g}{upper}")
        elif key in _FINITE and not (math.isfinite(value) and value >= 0):
            complaints.append(f"{key}={value}: must be a finite number, at least 0")
        elif key in _OPEN and not (math.isfinite(value) and value > 0):
            complaints.append(f"{key}={value}: must be a finite number above 0")
        elif key in _BELOW_ONE and not 0 <= value < 1:
            complaints.append(f"{key}={value}: must be at least 0 and below 1")
        elif key in _CHOICES and value not in _CHOICES[key]:
            complaints.append(f"{key}={value}: must be one of {', '.join(_CHOICES[key])}")
    heads, hidden = values.get("model.num_attention_heads"), values.get("model.hidden_size")
    if heads and hidden and hidden % heads:
        complaints.append(f"model.hidden_size={hidden}: must be a multiple of model.num_attention_heads={heads}")
    if values.get("data.pad_to") and values.get("scoring.name") == "published":
        complaints.append(f"data.pad_to={values['data.pad_to']}: scoring=published pads as published; leave it null")
    return complaints
