"""What must not stand in files that people publish: values under secret names, and passwords in addresses."""

import re
from typing import Any, Dict

MASK = "..."
_SECRET = re.compile(
    r"(?<![a-z])token(?![a-z])|secret|passw|api_?key|credential|private_?key|access_?key", re.IGNORECASE
)
_IN_ADDRESS = re.compile(r"//[^/@\s]+@")


def is_secret(name: str) -> bool:
    """Whether a name is that of a secret, such as HF_TOKEN."""
    return _SECRET.search(name) is not None


def mask_text(text: str) -> str:
    """A text without the user and password of an address in it."""
    return _IN_ADDRESS.sub(f"//{MASK}@", text)


def mask_override(argument: str) -> str:
    """An argument of a command line: of one that speaks of a secret the key alone is kept."""
    key, found, _ = argument.partition("=")
    if is_secret(argument):
        return f"{key}={MASK}" if found else MASK
    return mask_text(argument)


def mask_overrides(text: str) -> str:
    """Overrides joined by commas, as Hydra names a job by them; any other text as it is."""
    return ",".join(mask_override(part) if "=" in part else mask_text(part) for part in text.split(","))


def mask_config(node: Any, is_hidden: bool = False) -> Any:
    """A configuration as plain data, secrets masked."""
    if isinstance(node, dict):
        return {key: mask_config(value, is_hidden or is_secret(str(key))) for key, value in node.items()}
    if isinstance(node, list):
        return [mask_config(value, is_hidden) for value in node]
    if is_hidden and isinstance(node, str) and node:
        return MASK
    return mask_text(node) if isinstance(node, str) else node


def find_secrets(node: Any, prefix: str = "") -> Dict[str, str]:
    """What `mask_config` masks: dotted key -> value."""
    found: Dict[str, str] = {}
    for key, value in node.items() if isinstance(node, dict) else []:
        if isinstance(value, dict):
            found.update(find_secrets(value, f"{prefix}{key}."))
        elif isinstance(value, str) and mask_config({key: value}) != {key: value}:
            found[f"{prefix}{key}"] = value
    return found


def restore_secrets(node: Dict[str, Any], secrets: Dict[str, str]) -> None:
    """Put the values of `find_secrets` back into masked data."""
    for key, value in secrets.items():
        *parents, name = key.split(".")
        place: Any = node
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            place[name] = value
