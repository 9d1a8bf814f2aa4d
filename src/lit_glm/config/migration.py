"""Names that changed after version 0.1.0: one table for command lines, configuration files and run folders.

On a command line or in a configuration file an old key is an error that names the new one. In a run folder that an
older version has written, old names are replaced while the folder is read; the folder itself stays as it is.
"""

from typing import Any, Dict, List, Optional

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


def migrate_names(content: Dict[str, Any], place: str) -> Dict[str, Any]:
    """Return the content of a file with current names; names that are already current are kept.

    Args:
        content: content of the file, nested as in JSON.
        place: a key of `RENAMED`.
    """
    migrated = _copy_dicts(content)
    moves = sorted(RENAMED[place].items(), key=lambda move: -move[0].count("."))  # inner names first
    for old, new in moves:
        *parents, name = old.split(".")
        node: Any = migrated
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node:
            node.setdefault(new.split(".")[-1], node.pop(name))
    if place == "config":
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


def _copy_dicts(value: Any) -> Any:
    return {key: _copy_dicts(entry) for key, entry in value.items()} if isinstance(value, dict) else value
