"""Validation of values: ranges and choices of keys, and constraints between keys."""

import math
from typing import Any, Dict, List, Tuple

from lit_glm.config.schema import iter_leaves
from lit_glm.metrics.registry import OBJECTIVES

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
