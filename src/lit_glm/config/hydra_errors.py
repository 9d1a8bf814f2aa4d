"""User-facing messages for errors of Hydra and OmegaConf, with the closest valid names."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any, Iterable, List, Optional, Sequence

import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, ValidationError

from lit_glm.config.command_line import CommandLine
from lit_glm.config.key_aliases import old_key_message, suggest_key
from lit_glm.config.schema import Range, SyntheticConfig, iter_keys
from lit_glm.errors import InputError, exception_chain, first_line

_TYPES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def closest_names(name: str, known: Sequence[str]) -> List[str]:
    """Return up to three known names, most similar first; keys are compared as a whole and by their last part."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    last = name.rsplit(".", 1)[-1]
    by_last = {key.rsplit(".", 1)[-1]: key for key in reversed(list(known))}
    close += [by_last[tail] for tail in difflib.get_close_matches(last, list(by_last), n=3, cutoff=0.6)]
    close = close or difflib.get_close_matches(last, known, n=3, cutoff=0.0)
    return list(dict.fromkeys(close))[:3]


def explain_hydra_error(error: BaseException, schema: Any, conf: Path) -> str:
    """Turn an error of Hydra or OmegaConf into one message.

    Returns:
        The message: what is wrong, and the closest valid names.
    """
    chain = exception_chain(error)
    # Under a debugger OmegaConf also gives the cause of its own error, which does not know the key.
    cause = next((one for one in reversed(chain) if getattr(one, "full_key", None)), chain[-1])
    name = str(getattr(cause, "full_key", None) or "")
    if isinstance(cause, yaml.YAMLError):
        return _yaml_error_message(cause)
    if isinstance(cause, MissingConfigException):
        group, _, name = (cause.missing_cfg_file or "").rpartition("/")
        names = sorted(cause.options or (file.stem for file in (conf / group).glob("*.yaml")))
        nearest = f" (nearest: {', '.join(closest_names(name, names))})" if names else ""
        hint = f"; a file of your own: --config-dir FOLDER with {group}/{name}.yaml in it" if group else ""
        return f"{group}={name}: unknown {group}; choose one of {', '.join(names)}{nearest}{hint}"
    if isinstance(cause, OSError):
        return f"a configuration file cannot be read: {first_line(cause)}"
    if isinstance(cause, MissingMandatoryValue):
        return f"{name}: must have a value, but the chosen file (conf/{name.split('.')[0]}/) sets none"
    if isinstance(cause, ValidationError) and name:
        about = f"{type(getattr(cause, 'child_node', None)).__name__}: {first_line(cause)}"  # or of an element of it
        value, kind = getattr(cause, "value", None), next((_TYPES[name] for name in _TYPES if name in about), None)
        if "'None'" in first_line(cause) or "not Optional" in first_line(cause):
            return f"{name}=null: must have a value"
        return f"{name}={value}: must be {kind}" if kind else f"{name}: {first_line(cause)}"
    keys = [key for key, _, _ in iter_keys(schema())]
    nodes = sorted({key.rsplit(".", count)[0] for key in keys for count in range(1, key.count(".") + 1)})
    groups = sorted(entry.name for entry in conf.iterdir() if entry.is_dir() and any(entry.glob("*.yaml")))
    if isinstance(cause, (ConfigKeyError, AttributeError)) and name and name not in keys:
        if name in groups and name not in nodes:
            advice = "add `# @package _global_` as its first line"
            return f"{name}: the chosen file of this group sets top-level keys; {advice}"
        siblings = [key for key in keys if "." in name and key.rpartition(".")[0] == name.rpartition(".")[0]]
        siblings = [key for key in siblings if not key.endswith(".name")]  # the group's file sets it
        if siblings:
            nearest = closest_names(name, siblings)[0]
            return f"{name}: unknown key (nearest: {nearest}); the keys are {', '.join(siblings)}"
        close = ", ".join(closest_names(name, keys + nodes + groups))
        known = "(`--cfg job` prints all keys, `--help` all groups)"
        return f"{name}: unknown key or group; did you mean {close}? {known}"
    return first_line(error) if error is cause else f"{first_line(error)}\n{first_line(cause)}"


_CHOICES = {
    f"data.synthetic.{entry.name}": entry.metadata["allowed"]
    for entry in fields(SyntheticConfig)
    if isinstance(entry.metadata.get("allowed"), tuple) and not isinstance(entry.metadata["allowed"], Range)
}
"""Choices of keys that an interpolation of conf/ reads before the schema checks them."""
_FREE = ("hydra", "logger.", "callbacks.")
"""Prefixes of keys that the schema does not define one by one."""


def check_overrides(line: CommandLine, schema: Any, conf: Path, command: str = "train") -> None:
    """Reject malformed overrides, keys of other tools and older versions, and lists of values without -m.

    Raises:
        InputError: lists all of them, each with the correct form.
    """
    keys = [key for key, _, _ in iter_keys(schema())]
    nodes = {".".join(key.split(".")[:n]) for key in keys for n in range(1, key.count(".") + 1)}
    known = [*keys, *nodes, *(entry.name for entry in conf.iterdir() if entry.is_dir())]
    errors = []
    for index, (text, override) in enumerate(zip(line.overrides, line.parse_each())):
        if override is None:
            groups = [folder.name for folder in sorted(conf.iterdir()) if (folder / f"{text}.yaml").is_file()]
            meant = f"did you mean {groups[0]}={text}?" if groups else "`--help` lists the keys"
            key, _, value = text.partition("=")
            if value.strip() and not value[0].isspace() and not {"'", '"'} & set(value):  # = , : and brackets in it
                meant = f"if the value is right, quote it: '{key}=\"{value}\"'"
            errors.append(f"{text}: not KEY=VALUE (no spaces around =); {meant}")
            continue
        key, value = override.key_or_group, text.partition("=")[2]
        wrong = _set_group_name(key, override, conf) or _wrong_choice(key, override, conf, line.config_dir, nodes)
        if key in _CHOICES and not override.is_sweep_override() and override.value() not in _CHOICES[key]:
            wrong = f"must be one of {', '.join(_CHOICES[key])}"
        wrong = old_key_message(key, value) or (f"{text}: {wrong}" if wrong else None)
        if wrong is not None:
            errors.append(wrong)
            continue
        inside = any(key.startswith(f"{name}.") for name in keys)  # entry of a mapping such as hardware.peak_tflops
        is_change = not (override.is_add() or override.is_delete() or override.is_sweep_override())
        if is_change and (inside or (key in keys and isinstance(override.value(), dict))):
            line.overrides[index] = f"++{text}"  # the chosen files may not define the entry
        if override.is_add() or override.is_delete() or key in known or key.startswith(_FREE) or inside:
            if override.is_sweep_override() and not line.multirun and not key.startswith("hydra"):
                at_once = f"; all of them in one run: {key}=[{value}]" if key in ("logger", "callbacks") else ""
                errors.append(f"{text}: several values need a sweep (-m): {command} -m {text} ...{at_once}")
            continue
        better = suggest_key(key, value, known)
        if better is not None:
            errors.append(better)
    if errors:
        raise InputError("\n".join(errors))


_LISTS = ("logger", "callbacks")
"""Groups of which several files can be chosen at once."""


def _wrong_choice(
    key: str, override: Override, conf: Path, config_dir: Optional[str], nodes: Iterable[str]
) -> Optional[str]:
    """Return why a value is invalid for a group of files or of keys (`nodes`); None if it is valid."""
    folders = [conf, *([Path(config_dir)] if config_dir is not None else [])]
    names = sorted({file.stem for folder in folders for file in (folder / key).glob("*.yaml") if "." not in key})
    if key in nodes and override.is_delete():
        return "a run needs these keys; choose another file or value instead"
    if (not names and key not in nodes) or override.is_delete() or override.is_sweep_override():
        return None
    value, choices = override.value(), ", ".join(names)
    if not names:
        return None if isinstance(value, (dict, type(None))) else f"is a group of keys; set {key}.KEY=VALUE"
    if isinstance(value, (bool, int, float)) or (key == "fix_hp" and isinstance(value, str) and value not in names):
        return f"unknown {key}; choose one of {choices}"
    if value is None:
        return f"choose one of {choices}" + ("; `none` is one of the names" if "none" in names else "")
    if isinstance(value, list) and key not in _LISTS:
        return f"must be one name, not a list; choose one of {choices}, or start a sweep: -m {key}=A,B"
    return None


def _set_group_name(key: str, override: Override, conf: Path) -> Optional[str]:
    """Return an error if an override sets GROUP.name, which would label results with a wrong name; else None."""
    group, _, rest = key.partition(".")
    value = override.value() if not override.is_delete() and not override.is_sweep_override() else None
    sets_name = rest == "name" or (not rest and isinstance(value, dict) and "name" in value)
    if not sets_name or not (conf / group).is_dir():
        return None
    return f"the name identifies the chosen file of {group} and cannot be set; choose {group}=NAME"


def _yaml_error_message(error: yaml.YAMLError) -> str:
    """Return the location and the cause of a YAML syntax error."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    location = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "a YAML file"
    return f"{location}: {problem}; quote strings that contain ': ' or ' #', and indent with spaces only"
