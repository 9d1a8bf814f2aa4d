"""Values known only for a pair of chip and topology: the files of conf/fix_hp/, and what a search has found."""

import json
from pathlib import Path
from typing import Any, Dict, Tuple

from lit_glm.config.migration import migrate_names
from lit_glm.config.paths import CONF_DIR
from lit_glm.errors import InputError

TUNE_FILE = "tune.json"
"""What a search leaves in its folder."""
TRIALS_FOLDER = "tries"
"""Where the runs of its trials are."""
MODEL_KEYS = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "activation_checkpointing")
"""Of a model, what decides how large a batch may be."""


def topologies_with_fix_hp(hardware: str) -> Dict[str, int]:
    """Topologies of a chip for which values were published, with their numbers of ranks."""
    found = {}
    for file in sorted((CONF_DIR / "fix_hp").glob(f"{hardware}_*.yaml")):
        nodes, _, devices = file.stem[len(hardware) + 1 :].partition("x")
        if nodes.isdigit() and devices.isdigit():  # a chip's name may begin another's
            found[f"{nodes}x{devices}"] = int(nodes) * int(devices)
    return found


def nearest_pair_hint(hardware: str, ranks: int) -> str:
    """What to add where a pair has no published values: how to take those of the nearest topology; "" without one."""
    known = topologies_with_fix_hp(hardware)
    if not known:
        return ""
    nearest = min(known, key=lambda name: (abs(known[name] - ranks), known[name]))
    return f" (nearest: {hardware}_{nearest}, taken with fix_hp={hardware}_{nearest})"


def resolve_auto_bs(composed: Any, pair_bs: Any) -> Tuple[int, str]:
    """The batch size that `bs=auto` means: the newest search's for the same thing, else that of the pair's file.

    Args:
        composed: the configuration, bs not decided.
        pair_bs: what the pair's fix_hp file says; None: there is none.

    Returns:
        It, and where it is from.

    Raises:
        InputError: if nothing is known; nothing is searched here.
    """
    wanted = {
        "hardware": composed.hardware.name,
        "topology": f"{composed.topology.num_nodes}x{composed.topology.devices_per_node}",
        "precision": composed.precision.name,
        "scoring": composed.scoring.name,
        "model": composed.model.name,
    }
    also = {
        "tf32": composed.precision.tf32,
        **{key: composed.model[key] for key in MODEL_KEYS},
        "max_seq_length": composed.data.max_seq_length,
    }
    found = []
    for file in Path("outputs/tune").glob(f"*/*/{TUNE_FILE}"):
        try:
            content = migrate_names(json.loads(file.read_text(encoding="utf-8")), "tune.json")
        except (OSError, ValueError):
            continue
        if content.get("fastest_bs") and all(content.get(key) == value for key, value in {**wanted, **also}.items()):
            found.append((file.stat().st_mtime, str(file.parent), content))
    if found:
        _, place, content = max(found, key=lambda search: search[:2])
        bs = int(content["fastest_bs"])
        if not content.get("complete"):
            largest = content.get("largest_bs")
            return bs, (
                f"WARNING: the fastest so far of an incomplete search, {place} (largest tried: {largest}); resume it "
                f"with python -m lit_glm.tune ... run.resume={place}"
            )
        return bs, f"the fastest that {place} found"
    if pair_bs is not None:
        return int(pair_bs), f"the fix_hp file of {wanted['hardware']}_{wanted['topology']}"
    about = " ".join(wanted.values())
    given = " ".join(f"{key}={value}" for key, value in wanted.items())
    raise InputError(
        f"bs=auto: no batch size is known for {about}; `python -m lit_glm.tune {given}` finds one (below outputs/tune/)"
    )
