"""Help text with the comments of the configuration files, which Hydra's own help leaves out."""

from pathlib import Path
from typing import Any, Dict, List

from omegaconf import OmegaConf

from lit_glm.config.paths import CONF_DIR

_NOT_KEYS = ("defaults:", "hydra:")


def key_help(config_name: str) -> str:
    """Return the keys of a command's files in conf/ with their comments.

    Args:
        config_name: name of the primary file.
    """
    files: List[Path] = [CONF_DIR / f"{config_name}.yaml"]
    groups: Dict[str, Path] = {}
    defaults = _defaults_list(files[0])
    if "train" in defaults:
        files.insert(0, CONF_DIR / "train.yaml")
        defaults += _defaults_list(files[0])
    for entry in defaults:
        for group, name in entry.items() if isinstance(entry, dict) else []:
            file = CONF_DIR / str(group) / f"{name}.yaml"
            if file.is_file() and group != "hydra_settings":
                groups[str(group)] = file
    parts = ["== What the keys mean =="]
    for file in [*files, *groups.values()]:
        lines = _key_lines(file)
        if lines:
            inside = "" if file.parent == CONF_DIR else f", below {file.parent.name}:"
            parts += ["", f"# conf/{file.relative_to(CONF_DIR)}{inside}", *lines]
    return "\n".join(parts)


def _defaults_list(file: Path) -> List[Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return list(content.get("defaults") or [])


def _key_lines(file: Path) -> List[str]:
    """Return the lines of a file without `defaults:`, `hydra:` and unindented comments."""
    kept: List[str] = []
    inside = True
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            inside = not line.startswith(_NOT_KEYS)
        if inside and line.strip() and not line.startswith("#"):
            kept.append(line.rstrip())
    return kept
