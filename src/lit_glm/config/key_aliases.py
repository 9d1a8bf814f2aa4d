"""Other names of configuration keys: those that other tools use, and those of earlier versions."""

import copy
import re
from typing import Any, Dict, List, Optional, Sequence

_KEYS: Dict[str, str] = {
    "lr": "learning_rate, learningrate, max_lr, base_lr",
    "bs": "batch_size, batchsize, train_batch_size, micro_batch_size, per_device_train_batch_size, batch",
    "eval_bs": "eval_batch_size, per_device_eval_batch_size, val_batch_size, test_batch_size",
    "seed": "random_seed, manual_seed, random_state",
    "run.max_steps": "steps, max_steps, num_steps, train_steps, iterations, max_iters, train_iters",
    "run.max_samples": "samples, max_samples, num_samples",
    "run.target_accuracy": "target, target_acc, target_accuracy, accuracy",
    "run.resume": "resume, resume_from, resume_from_checkpoint, ckpt_path",
    "run.checkpoint_interval_steps": "save_steps, save_interval, checkpoint_interval, save_every",
    "topology.devices_per_node": "gpus, num_gpus, n_gpus, ngpus, devices, num_devices, gpus_per_node, nproc_per_node",
    "topology.num_nodes": "nodes, num_nodes, nnodes, n_nodes, num_machines",
    "hydra.run.dir": "output_dir, out_dir, save_dir, run_dir, log_dir, default_root_dir",
    "hydra.sweep.dir": "sweep_dir",
    "model.init_checkpoint": "checkpoint, pretrained, weights, init_checkpoint, model_path, model_name_or_path, load",
    "model.num_layers": "layers, num_layers, n_layers, n_layer",
    "model.hidden_size": "hidden, hidden_size, d_model, width, n_embd",
    "model.num_attention_heads": "heads, num_heads, n_heads, n_head, num_attention_heads",
    "model.activation_checkpointing": "activation_checkpointing, gradient_checkpointing, checkpoint_activations",
    "data.max_seq_length": "seq_length, max_seq_length, max_length, seq_len, sequence_length",
    "data.num_workers": "workers, num_workers, dataloader_num_workers",
    "data.raw_dir": "raw_dir, data_dir, data_path, dataset_dir",
    "data.vocab_file": "vocab, vocab_file, vocabulary",
    "optimizer.weight_decay": "weight_decay, wd",
    "optimizer.gradient_accumulation_steps": "grad_accum, accumulate_grad_batches",
    "optimizer.clip_grad": "clip, clip_grad, max_grad_norm, gradient_clip_val, grad_clip",
    "optimizer.warmup": "warmup, warmup_ratio",
    "hardware": "device, accelerator, chip, card, backend_device",
    "experiment": "exp, recipe, preset",
    "logger": "loggers, report_to, log_to",
    "sweep.objective": "objective, metric",
    "run.overwrite": "overwrite, force",
}
_ALIASES = {word: key for key, words in _KEYS.items() for word in words.split(", ")}
_TYPES = {"float32": "fp32", "fp32": "fp32", "float16": "fp16", "fp16": "amp", "bfloat16": "bf16", "bf16": "bf16"}
_SAMPLES = "run.eval_interval_samples=N (samples, not steps: N = steps x bs x devices)"
_OTHER_UNITS = {
    **dict.fromkeys(("eval_interval", "eval_every", "eval_steps", "val_check_interval"), _SAMPLES),
    "warmup_steps": "optimizer.warmup=SHARE (of optimizer.lr_decay_iters, not steps)",
    "num_warmup_steps": "optimizer.warmup=SHARE (of optimizer.lr_decay_iters, not steps)",
}
_PRECISIONS = ("fp32", "fp16", "bf16", "amp", "tf32")
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _normalise_key(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", key.lower()).strip("_")


def suggest_key(key: str, value: Any, known: Sequence[str]) -> Optional[str]:
    """Suggest the correct form of a key that does not exist.

    Returns:
        The message; None if there is no suggestion.
    """
    word = _normalise_key(key.rsplit(".", 1)[-1])
    prefix = f"{key}={value}: unknown key"
    if word in _PRECISIONS:
        if word == "tf32":
            return f"{prefix}; write precision=fp32 precision.tf32={str(value).lower()}"
        if str(value).lower() in _NO:
            return f"{prefix}; write precision=fp32, or another of fp32, amp, fp16, bf16"
        return f"{prefix}; write precision={word}"
    if word in ("epochs", "epoch", "num_epochs", "max_epochs", "num_train_epochs"):
        return (
            f"{prefix}: runs are limited by samples or steps; write run.max_samples=N (one epoch: the number of "
            "training examples) or run.max_steps=N"
        )
    if word in ("dtype", "mixed_precision", "torch_dtype", "amp_level"):
        return f"{prefix}; write precision={_TYPES.get(str(value).lower(), 'fp32, amp, fp16 or bf16')}"
    if word in _OTHER_UNITS:
        return f"{prefix}; write {_OTHER_UNITS[word]}"
    meant = _ALIASES.get(word)
    if meant is None or key in known:
        return None
    if meant.startswith("topology."):
        wide = f"topology=1x{value}" if meant.endswith("node") else f"topology={value}x8"
        return f"{prefix}; write {wide} (nodes x devices per node), or {meant}={value}"
    return f"{prefix}; write {meant}={value}"


CHANGED_IN = "0.2.0"
RENAMED: Dict[str, Dict[str, str]] = {
    "config": {
        "optimizer.accumulate": "optimizer.gradient_accumulation_steps",
        "hardware.card": "hardware.product_name",
        "hardware.detect": "hardware.device_name_pattern",
        "report.card": "report.device_name",
        "plan.cards": "plan.device_counts",
        "tuned_for": "fix_hp_source",
    },
    "job.json": {"identity": "config_hash", "entry": "start_time", "resumes": "is_resume"},
    "result.json": {
        "tuned_for": "fix_hp_source",
        "others_load": "external_cpu_load",
        "others_on_cards": "external_device_processes",
        "warm_up": "first_steps",
        "warm_up.steps": "first_steps.count",
        "warm_up.slower": "first_steps.slowdown",
    },
    "environment.json": {"card": "device_name", "cards": "devices"},
    "tune.json": {"identity": "config_hash", "done": "complete", "tries": "trials"},
    "runtime class": {
        "missing": "unavailable_reason",
        "cannot_span": "multi_node_unsupported_reason",
        "read_later": "to_host_async",
        "kernels": "model_ops",
        "processes_on": "num_processes",
        "memory_now": "memory_in_use",
        "watch_memory": "attach_memory_monitor",
        "install": "install_hint",
    },
}
"""For each place, old name -> new name; dots separate the levels."""
REMOVED_KEYS = {"optimizer.lr_decay_style": "the learning rate always decays linearly; leave the key out"}
"""Configuration keys without a successor, and what to do instead."""


def old_key_message(key: str, value: Optional[str] = None) -> Optional[str]:
    """Return what to write instead of a configuration key of an older version.

    Args:
        key: dotted key as written.
        value: value as written; None: the message names only keys.

    Returns:
        The message; None if the key is not an old one.
    """
    shown = key if value is None else f"{key}={value}"
    new = RENAMED["config"].get(key)
    if new is not None:
        return f"{shown}: renamed in lit_glm {CHANGED_IN}; write {new if value is None else f'{new}={value}'}"
    if key in REMOVED_KEYS:
        return f"{shown}: removed in lit_glm {CHANGED_IN}; {REMOVED_KEYS[key]}"
    return None


def migrate_names(content: Dict[str, Any], file_kind: str) -> Dict[str, Any]:
    """Return the content of a file with current names; names that are already current are kept.

    Args:
        content: content of the file, nested as in JSON.
        file_kind: a key of `RENAMED`.
    """
    migrated = copy.deepcopy(content)
    moves = sorted(RENAMED[file_kind].items(), key=lambda move: -move[0].count("."))  # inner names first
    for old, new in moves:
        *parents, name = old.split(".")
        node: Any = migrated
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node:
            node.setdefault(new.split(".")[-1], node.pop(name))
    if file_kind == "config":
        for key in REMOVED_KEYS:
            group, _, name = key.rpartition(".")
            if isinstance(migrated.get(group), dict):
                migrated[group].pop(name, None)
    return migrated


def migrate_job(content: Dict[str, Any]) -> Dict[str, Any]:
    """Return the content of job.json with current names, those of its configuration included."""
    migrated = migrate_names(content, "job.json")
    if isinstance(migrated.get("config"), dict):
        migrated["config"] = migrate_names(migrated["config"], "config")
    return migrated


def find_old_methods(runtime: type) -> List[str]:
    """Return a line for each method of a runtime class that has the name of an older version."""
    renamed = RENAMED["runtime class"]
    return [f"{old} -> {new}" for old, new in renamed.items() if hasattr(runtime, old)]
