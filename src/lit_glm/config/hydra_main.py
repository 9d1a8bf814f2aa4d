"""Hydra entry point: composes and validates a configuration, then runs a task; invalid input exits with status 2.

Errors before the task starts are caused by the user's input, errors inside it are not. Therefore the configuration is
composed here with Hydra's compose API, and the task is called with it. `hydra.main` handles --cfg, --info, completion
and sweeps.
"""

import errno
import logging
import os
import re
import string
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_glm.config.command_line import CommandLine
from lit_glm.config.hydra_errors import check_overrides, explain_hydra_error
from lit_glm.config.key_aliases import REMOVED_KEYS, RENAMED, old_key_message
from lit_glm.config.schema import CONF_DIR, TrainConfig, range_errors
from lit_glm.config.tuned_values import resolve_auto_bs
from lit_glm.console import set_up_console
from lit_glm.errors import InputError, RunError, first_line
from lit_glm.launch.signals import reraise_interruption, run_interruptible
from lit_glm.openmp import limit_spinning

log = logging.getLogger(__name__)

_NOT_KEYS = ("defaults:", "hydra:")
_COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)
"""Errors of an invalid configuration; Hydra raises a bare ValueError for some overrides."""


def command_help(composed: DictConfig, line: CommandLine) -> str:
    """Return the help of a command: Hydra's template filled in, then the comments of the keys.

    Hydra's own `--help` copies its whole repository of configurations for every group, which takes several seconds.
    """
    groups: Dict[str, List[str]] = {}
    for place in (CONF_DIR, *find_user_folders(composed.hydra)):
        for file in place.glob("*/**/*.yaml"):
            groups.setdefault(file.parent.relative_to(place).as_posix(), []).append(file.stem)
    names = {group: ", ".join(sorted(set(options))) for group, options in sorted(groups.items())}
    text = string.Template(composed.hydra.help.template).safe_substitute(
        APP_CONFIG_GROUPS="".join(f"{group}: {options}\n" for group, options in names.items()),
        CONFIG=OmegaConf.to_yaml(without_hydra(composed), resolve="--resolve" in line.flags),
    )
    return f"{text}\n{key_help(composed)}"


def key_help(composed: DictConfig) -> str:
    """Return the keys of a composed configuration's files in conf/ with their comments."""
    choices, command = composed.hydra.runtime.choices, composed.hydra.job.config_name
    names = ["train"] * ("topology" in choices) + [command] * (command != "train")
    for group, chosen in reversed(choices.items()):  # a list such as [csv,tensorboard] is text there
        if group != "hydra_settings":
            names += [f"{group}/{name.strip()}" for name in str(chosen).strip("[]").split(",")]
    parts = ["== What the keys mean =="]
    for file in filter(Path.is_file, (CONF_DIR / f"{name}.yaml" for name in names)):
        lines = _key_lines(file)
        if lines:
            inside = "" if file.parent == CONF_DIR else f", below {file.parent.name}:"
            parts += ["", f"# conf/{file.relative_to(CONF_DIR)}{inside}", *lines]
    return "\n".join(parts)


def _key_lines(file: Path) -> List[str]:
    """Return the lines of a file without `defaults:`, `hydra:` and unindented comments."""
    kept: List[str] = []
    inside = True
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            inside = not line.startswith(_NOT_KEYS)
        if inside and line.strip() and not line.startswith(("#", "{}")):
            kept.append(line.rstrip())
    return kept


Config = TypeVar("Config")


class TaskOutcome(NamedTuple):
    """Exit status of a task, and in a sweep the metric that a sweeper optimises."""

    status: int
    objective: Optional[float] = None
    """Metric that a sweeper optimises; None: the job failed, which is a failed trial."""


Task = Callable[[Any, DictConfig], Union[int, TaskOutcome]]
BeforeSweep = Callable[[DictConfig, CommandLine], List[str]]


def find_user_folders(hydra_node: Any) -> List[Path]:
    """Return the folders of the user's configuration files (--config-dir), as the `hydra` node lists them."""
    sources = [Path(source.path) for source in hydra_node.runtime.config_sources if source.schema == "file"]
    return [folder for folder in sources if folder != CONF_DIR]


def validate_config(cfg: DictConfig, schema: "type[Config]", user_folders: Sequence[Path] = ()) -> Config:
    """Check names, types and ranges of a composed configuration.

    Args:
        cfg: the composed configuration, without the `hydra` node; the value of `bs=auto` is set in it.
        schema: the dataclass that it must match.
        user_folders: folders of the user's configuration files (--config-dir).

    Returns:
        The configuration as that dataclass, all interpolations resolved.

    Raises:
        InputError: on an unknown key, a wrong type or a value out of range; names all that are out of range.
    """
    if cfg.get("bs") == "auto":
        cfg.bs, source = resolve_auto_bs(cfg, _fix_hp_bs(cfg, user_folders))
        log.warning(f"bs=auto: {cfg.bs}, {source}")
    _reject_old_keys(cfg, user_folders)
    try:
        # Merging the plain content enforces the schema, which `+typo=1` and `++typo=1` bypass in Hydra.
        # merge rejects unknown names and wrong types, to_object rejects missing values.
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        hardware = plain.get("hardware", {})
        if hardware and "accelerator" not in hardware:
            is_cpu = hardware.get("runtimes") == ["cpu"] and not hardware.get("_target_")
            hardware["accelerator"] = "cpu" if is_cpu else hardware.get("name")
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(explain_hydra_error(error, schema, CONF_DIR)) from error
    complaints = range_errors(config)
    if config.data.name == "record" and config.data.synthetic is not None:
        complaints.append(
            "data=record: is the published data, and chosen where no other data= is given, but data.synthetic is set "
            "(by the experiment, or on the command line) and would generate other data under this name; add "
            "data.synthetic=null or data=synthetic, or leave data=record out"
        )
    if complaints:
        raise InputError("\n".join(complaints))
    return config


def _reject_old_keys(cfg: DictConfig, user_folders: Sequence[Path]) -> None:
    """Reject keys of older versions that a configuration file sets.

    Raises:
        InputError: names the new key of each, and the user's file if one sets it.
    """
    messages = []
    for key in (*RENAMED["config"], *REMOVED_KEYS):
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group) if group else cfg
        if isinstance(node, DictConfig) and name in node.keys():  # noqa: SIM118 (`in` hides values that are missing)
            messages.append(f"{_find_user_file_setting(name, user_folders)}{old_key_message(key)}")
    if messages:
        raise InputError("\n".join(messages))


def _find_user_file_setting(name: str, user_folders: Sequence[Path]) -> str:
    """Return the first of the user's configuration files that sets a key of this name, as the start of a message."""
    for file in (file for folder in user_folders for file in sorted(folder.rglob("*.yaml"))):
        if re.search(rf"^\s*{name}\s*:", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
            return f"{file}: "
    return ""


def _fix_hp_bs(cfg: DictConfig, user_folders: Sequence[Path]) -> Optional[int]:
    """Return bs of the selected fix_hp file, which `bs=auto` has overridden in `cfg`; None if there is none."""
    for place in (CONF_DIR, *user_folders):
        file = place / "fix_hp" / f"{cfg.get('fix_hp_source', 'none')}.yaml"
        if file.is_file():
            content: Any = OmegaConf.load(file)
            bs = content.get("bs")
            return int(bs) if isinstance(bs, int) else None
    return None


def _store_schema() -> None:
    """Give every key its default through `- schema` in a defaults list: no file has to set all keys, all can be set."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(TrainConfig))
    del plain["hardware"]["accelerator"]  # by default the name of the device, `cpu` where that is its runtime
    ConfigStore.instance().store("schema", plain)


_store_schema()


def compose_config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration in this process, as the command line would."""
    return without_hydra(_compose_with_hydra(config_name, overrides)[0])


def load_config(config_name: str, overrides: Sequence[str], schema: "type[Config]") -> Config:
    """Compose and validate a configuration in this process.

    Raises:
        InputError: as the command line would reject these overrides.
    """
    try:
        composed = _compose_with_hydra(config_name, overrides)[0]
        return validate_config(without_hydra(composed), schema, find_user_folders(composed.hydra))
    except _COMPOSE_ERRORS as error:
        raise InputError(explain_hydra_error(error, schema, CONF_DIR)) from error


def without_hydra(composed: DictConfig) -> DictConfig:
    """Return a composed configuration without the `hydra` node."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


@reraise_interruption()
def _compose_with_hydra(config_name: str, overrides: Sequence[str]) -> Tuple[DictConfig, List[str]]:
    """Compose a configuration including the `hydra` node.

    Returns:
        The configuration, and the override that selects the fix_hp file of the actual topology, if the chosen names
        select another one.

    Raises:
        InputError: if an override has a value for which Hydra has no message of its own.
    """
    sweep = GlobalHydra.instance().hydra  # set while `hydra.main` runs a job of a sweep
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3", job_name=config_name):
            composed = hydra.compose(config_name, overrides=list(overrides), return_hydra_config=True)
            better = _fix_hp_override(composed, overrides)
            if better is not None:
                composed = hydra.compose(config_name, overrides=[*overrides, better], return_hydra_config=True)
    except (AssertionError, AttributeError, TypeError) as error:  # Hydra and OmegaConf do not check every value
        raise InputError(
            f"Hydra cannot apply {' '.join(overrides)} ({first_line(error)}): set hydra.sweeper.params in a "
            "configuration file, and give every other key a value of its type (see --cfg all)"
        ) from error
    finally:
        GlobalHydra.instance().hydra = sweep
    return composed, [] if better is None else [better]


def _fix_hp_override(composed: DictConfig, overrides: Sequence[str]) -> Optional[str]:
    """Return the override that replaces a fix_hp file of another topology; None if no override is needed.

    Hydra selects the file by the names of hardware and topology, but `topology.num_nodes=` changes the actual topology.
    """
    if "topology" not in composed or CommandLine(list(overrides)).sets("fix_hp"):
        return None
    choices = composed.hydra.runtime.choices
    selected_pair = f"{choices.hardware}_{choices.topology}"
    actual_pair = f"{choices.hardware}_{composed.topology.num_nodes}x{composed.topology.devices_per_node}"
    if actual_pair == selected_pair:
        return None
    available = GlobalHydra.instance().config_loader().get_group_options("fix_hp")
    if actual_pair in available:
        return f"fix_hp={actual_pair}"
    return "~fix_hp" if selected_pair in available else None


def run_command(
    config_name: str,
    schema: "type[Config]",
    task: Task,
    before_sweep: Optional[BeforeSweep] = None,
    arguments: Optional[List[str]] = None,
) -> int:
    """Run `task` with the configuration of the command line; delegate --cfg and sweeps to Hydra.

    Args:
        config_name: the primary file in conf/.
        schema: the dataclass that the composed configuration must match.
        task: takes the validated and the composed configuration; returns an exit status or a `TaskOutcome`.
        before_sweep: takes a combination's configuration and the command line; may reject the sweep, and returns
            further overrides for it.
        arguments: arguments for Hydra; None: those of the process.

    Returns:
        The exit status: 0 success, 1 failure, 2 invalid input, or what `task` returns; the highest in a sweep.
    """
    set_up_console()
    limit_spinning()  # before anything loads torch
    argv = sys.argv
    sys.argv = argv if arguments is None else [argv[0], *arguments]  # which Hydra reads
    try:
        return run_interruptible(lambda: _run_command(config_name, schema, task, before_sweep))
    finally:
        sys.argv = argv


def _run_command(
    config_name: str,
    schema: "type[Config]",
    task: Task,
    before_sweep: Optional[BeforeSweep],
) -> int:
    extra_overrides: List[str] = []
    try:
        line = CommandLine.read(sys.argv[1:])
        if line.shows_help:
            composed_with_hydra, _ = _compose_with_hydra(
                config_name, [*line.sample_combinations(lambda _: False)[0], *line.searchpath]
            )
            print(command_help(composed_with_hydra, line))
            return 0
        if not line.is_help:
            check_overrides(line, schema, CONF_DIR, config_name)
            combinations = line.sample_combinations(is_group(line.config_dir)) if line.multirun else [line.overrides]
            for overrides in combinations:
                composed_with_hydra, extra_overrides = _compose_with_hydra(config_name, [*overrides, *line.searchpath])
            mode = composed_with_hydra.hydra.mode
            if not line.multirun and mode is not None and mode.name == "MULTIRUN":
                raise InputError("hydra.mode=MULTIRUN (of a configuration file): start a sweep with -m instead")
            if not line.multirun:
                composed = without_hydra(composed_with_hydra)
                user_folders = find_user_folders(composed_with_hydra.hydra)
                config = validate_config(composed, schema, user_folders)  # replaces bs=auto
            else:
                extra_overrides = [] if before_sweep is None or line.cfg else before_sweep(composed_with_hydra, line)
    except InputError as error:
        return _print_error(str(error), 2)
    except _COMPOSE_ERRORS as error:
        return _print_error(explain_hydra_error(error, schema, CONF_DIR), 2)
    if line.is_help or line.cfg or line.multirun:
        return _delegate_to_hydra(config_name, schema, task, line, extra_overrides)
    HydraConfig.instance().set_config(composed_with_hydra)
    try:
        return _run_task(task, config, composed).status
    finally:
        HydraConfig.instance().cfg = None


def is_sweep_job() -> bool:
    """Return whether this task is one job of a sweep (-m)."""
    mode = HydraConfig.get().mode
    return mode is not None and mode.name != "RUN"


def output_dir() -> Path:
    """Return the folder of the command's files: `hydra.run.dir`, or that of the job in a sweep."""
    if not is_sweep_job():
        return Path(HydraConfig.get().run.dir).resolve()
    # Hydra has resolved this value; a `${` that is left in it is part of the name of a folder.
    runtime: Any = OmegaConf.to_container(HydraConfig.get().runtime, resolve=False)
    return Path(runtime["output_dir"]).resolve()


def is_group(config_dir: Optional[str]) -> Callable[[str], bool]:
    """Return a predicate for configuration groups: keys with a folder in conf/ or in `config_dir`."""
    places = [CONF_DIR, *([Path(config_dir)] if config_dir else [])]
    return lambda key: key.startswith("hydra/") or any((place / key).is_dir() for place in places)


def _print_error(message: str, status: int) -> int:
    log.error(message)
    return status


def _run_task(task: Task, config: Any, composed: DictConfig) -> TaskOutcome:
    """Call the task; turn every exception into a message and an exit status."""
    environment = dict(os.environ)
    try:
        with reraise_interruption():
            returned = task(config, composed)
    except (InputError, RunError) as error:
        return TaskOutcome(_print_error(str(error), error.exit_status))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            place = "" if error.filename is None else f"{error.filename}: "
            return TaskOutcome(_print_error(f"{place}cannot be accessed ({error.strerror})", InputError.exit_status))
        traceback.print_exc()
        return TaskOutcome(
            _print_error("unexpected error (see traceback): a bug in lit_glm or a plugin, not in the command line", 1)
        )
    finally:  # variables of the hardware file must not leak into the next job of this process
        os.environ.clear()
        os.environ.update(environment)
    return returned if isinstance(returned, TaskOutcome) else TaskOutcome(returned)


def _delegate_to_hydra(
    config_name: str, schema: "type[Config]", task: Task, line: CommandLine, extra_overrides: List[str]
) -> int:
    """Call `hydra.main`; in a sweep it runs the task for each combination, and a failed job does not stop the others.

    Args:
        config_name: the primary file in conf/.
        schema: the dataclass that a combination must match.
        task: called for each combination.
        line: the command line.
        extra_overrides: further overrides that are not on the command line.
    """
    statuses: List[int] = []

    def job(cfg: DictConfig) -> Optional[float]:
        user_folders = find_user_folders(HydraConfig.get())
        cfg = _recompose_for_topology(config_name, cfg, line.searchpath)
        outcome = _run_task(
            lambda _, composed: task(validate_config(composed, schema, user_folders), composed), None, cfg
        )
        statuses.append(outcome.status)
        return outcome.objective

    arguments, full_error = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")
    try:
        # Hydra requires flags after all overrides.
        sys.argv = [arguments[0], *line.overrides, *extra_overrides, *line.flags]
        if line.multirun:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise errors of sweepers and launchers, not print them
        with reraise_interruption():
            hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()
    except SystemExit as ended:  # Hydra has printed the error
        statuses.append(ended.code if isinstance(ended.code, int) else 1)
    except (HydraException, OmegaConfBaseException) as error:
        statuses.append(_print_error(explain_hydra_error(error, schema, CONF_DIR), 2))
    except Exception as error:
        if full_error is not None:
            traceback.print_exc()
        reason = first_line(error)
        none = "no job succeeded; " if statuses and all(statuses) else ""
        message = f"sweep aborted: {none}the sweeper or launcher raised {type(error).__name__}: {reason}"
        statuses.append(_print_error(f"{message} (set HYDRA_FULL_ERROR=1 for the traceback)", 1))
    finally:
        sys.argv = arguments
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    return max(statuses, default=0)


def _recompose_for_topology(config_name: str, cfg: DictConfig, searchpath: List[str]) -> DictConfig:
    """Return a combination's configuration with the fix_hp file of its actual topology."""
    if "topology" not in cfg:
        return cfg
    actual_topology = f"{cfg.topology.num_nodes}x{cfg.topology.devices_per_node}"
    if dict(HydraConfig.get().runtime.choices).get("topology") == actual_topology:
        return cfg
    return compose_config(config_name, [*HydraConfig.get().overrides.task, *searchpath])
