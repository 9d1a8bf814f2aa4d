"""Masking of secrets in files that may be published: values with secret names, and credentials in URLs."""

import re
from typing import Any

MASK = "..."
_SECRET = re.compile(
    r"(?<![a-z])token(?![a-z])|secret|passw|api_?key|credential|private_?key|access_?key", re.IGNORECASE
)
_URL_CREDENTIALS = re.compile(r"//[^/@\s]+@")


def is_secret(name: str) -> bool:
    """Return whether a name denotes a secret, such as HF_TOKEN."""
    return _SECRET.search(name) is not None


def mask_text(text: str) -> str:
    """Mask user name and password of the URLs in a text."""
    return _URL_CREDENTIALS.sub(f"//{MASK}@", text)


def mask_override(argument: str) -> str:
    """Mask a command-line argument: all but the key if it mentions a secret, else credentials in URLs."""
    key, separator, _ = argument.partition("=")
    if is_secret(argument):
        return f"{key}={MASK}" if separator else MASK
    return mask_text(argument)


def mask_overrides(text: str) -> str:
    """Mask overrides joined by commas (Hydra's `override_dirname`); of other text only credentials in URLs."""
    return ",".join(mask_override(part) if "=" in part else mask_text(part) for part in text.split(","))


def mask_config(node: Any, is_hidden: bool = False) -> Any:
    """Return a configuration of plain data with secrets masked."""
    if isinstance(node, dict):
        return {key: mask_config(value, is_hidden or is_secret(str(key))) for key, value in node.items()}
    if isinstance(node, list):
        return [mask_config(value, is_hidden) for value in node]
    if is_hidden and isinstance(node, str) and node:
        return MASK
    return mask_text(node) if isinstance(node, str) else node
