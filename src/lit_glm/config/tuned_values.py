"""Values for a pair of hardware and topology: the files of conf/fix_hp/, and the results of `tune`."""

from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

from lit_glm.atomic_files import read_json
from lit_glm.config.key_aliases import migrate_names
from lit_glm.config.schema import CONF_DIR
from lit_glm.errors import InputError

TUNE_FILE = "tune.json"
"""File with the state of a search, in its folder."""
TRIALS_FOLDER = "tries"
"""Subfolder with the runs of a search's trials."""
_MODEL_KEYS = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "activation_checkpointing")
"""Model keys that determine the largest possible batch size."""


def topologies_with_fix_hp(hardware: str) -> Dict[str, int]:
    """Return the topologies with a fix_hp file for a hardware name, with their numbers of ranks."""
    device_counts = {}
    for file in sorted((CONF_DIR / "fix_hp").glob(f"{hardware}_*.yaml")):
        nodes, _, devices = file.stem[len(hardware) + 1 :].partition("x")
        if nodes.isdigit() and devices.isdigit():  # one hardware name may be a prefix of another
            device_counts[f"{nodes}x{devices}"] = int(nodes) * int(devices)
    return device_counts


def nearest_pair_hint(hardware: str, ranks: int) -> str:
    """Return a hint to the fix_hp file of the nearest topology, for pairs without one; "" if there is none."""
    known = topologies_with_fix_hp(hardware)
    if not known:
        return ""
    nearest = min(known, key=lambda name: (abs(known[name] - ranks), known[name]))
    return f" (nearest: {hardware}_{nearest}; use fix_hp={hardware}_{nearest})"


def search_key(config: Any) -> Dict[str, Any]:
    """Return the settings for which the result of a search holds, of a composed or validated configuration."""
    return {
        "hardware": config.hardware.name,
        "topology": f"{config.topology.num_nodes}x{config.topology.devices_per_node}",
        "precision": config.precision.name,
        "scoring": config.scoring.name,
        "model": config.model.name,
        "tf32": config.precision.tf32,
        "simulated": config.hardware.runtime == "simulated",
        **{key: getattr(config.model, key) for key in _MODEL_KEYS},
        "max_seq_length": config.data.max_seq_length,
    }


def read_search(folder: Path) -> Dict[str, Any]:
    """Read tune.json of a folder; {} if it is missing or invalid."""
    return migrate_names(read_json(folder / TUNE_FILE) or {}, "tune.json")


def searches() -> Iterator[Tuple[Path, Dict[str, Any]]]:
    """Yield folder and content of the searches below outputs/tune/, the newest first."""
    places = ("*/*", "*/*/*")  # DATE/TIME, with a number in a sweep
    paths = [file for place in places for file in Path("outputs/tune").glob(f"{place}/{TUNE_FILE}")]
    files = [(file.stat().st_mtime, str(file)) for file in paths]
    for _, name in sorted(files, reverse=True):
        yield Path(name).parent, read_search(Path(name).parent)


def resolve_auto_bs(composed: Any, pair_bs: Any) -> Tuple[int, str]:
    """Resolve `bs=auto`: the result of the newest matching search, else the value of the fix_hp file.

    Args:
        composed: the configuration, with bs unresolved.
        pair_bs: bs of the fix_hp file; None if there is none.

    Returns:
        The batch size and its source.

    Raises:
        InputError: if no batch size is known; no search is started.
    """
    required = search_key(composed)
    for place, content in searches():
        stored = {"simulated": False, **content}  # files of earlier versions lack this key
        if not content.get("fastest_bs") or any(stored.get(key) != value for key, value in required.items()):
            continue
        bs = int(content["fastest_bs"])
        if not content.get("complete"):
            largest = content.get("largest_bs")
            return bs, (
                f"WARNING: fastest so far in an incomplete search, {place} (largest tried: {largest}); resume it "
                f"with python -m lit_glm.tune ... run.resume={place}"
            )
        return bs, f"fastest in {place}"
    if pair_bs is not None:
        return int(pair_bs), f"from the fix_hp file of {required['hardware']}_{required['topology']}"
    chosen = {key: required[key] for key in ("hardware", "topology", "precision", "scoring", "model")}
    about, given = " ".join(chosen.values()), " ".join(f"{key}={value}" for key, value in chosen.items())
    raise InputError(
        f"bs=auto: no batch size is known for {about}; `python -m lit_glm.tune {given} data={composed.data.name}`, "
        "with the same keys of data and model, finds one (below outputs/tune/)"
    )
