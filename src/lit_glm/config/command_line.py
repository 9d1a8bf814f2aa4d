"""Command-line parser: flags by argparse, overrides by Hydra's grammar."""

import argparse
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from lit_glm.compat import config_loader
from lit_glm.config.key_aliases import suggest_key
from lit_glm.config.schema import CONF_DIR
from lit_glm.errors import InputError


def quote(text: str) -> str:
    """Quote a text as the value of an override, so that Hydra and OmegaConf read exactly this text.

    A backslash escapes a `${`, which otherwise starts an interpolation, and a quote, which otherwise ends the value.
    Backslashes in front of these two are doubled; other backslashes stay as they are.
    """
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    literal = re.sub(r"(\\*)'", r"\1\1\\'", literal)
    return "'" + re.sub(r"(\\+)$", r"\1\1", literal) + "'"


@dataclass
class CommandLine:
    """Parsed command line: Hydra's flags and overrides."""

    overrides: List[str]
    multirun: bool = False
    cfg: bool = False
    """Whether --cfg was given, which prints the configuration."""
    is_help: bool = False
    """Whether other output was requested (help, info, version, completion); nothing is run then."""
    shows_help: bool = False
    """Whether that is the help of this command (--help)."""
    config_dir: Optional[str] = None
    """Folder of the user's configuration files (--config-dir)."""
    flags: Tuple[str, ...] = ()
    """All arguments that are not overrides, as typed."""

    @classmethod
    def read(cls, arguments: Sequence[str]) -> "CommandLine":
        """Parse the arguments that follow the command name.

        Raises:
            InputError: on an unknown flag, a flag without its value, or a missing --config-dir.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--help", "-h", action="store_true")
        for flags in (("--hydra-help",), ("--version",), ("--shell-completion", "-sc")):
            parser.add_argument(*flags, dest="prints", action="store_true")
        parser.add_argument("--info", "-i", nargs="?", const="all")
        parser.add_argument("--cfg", "-c")
        parser.add_argument("--resolve", action="store_true")
        parser.add_argument("--run", "-r", action="store_true")
        parser.add_argument("--multirun", "-m", action="store_true")
        for flags in (
            ("--package", "-p"),
            ("--config-path", "-cp"),
            ("--config-name", "-cn"),
            ("--experimental-rerun",),
        ):
            parser.add_argument(*flags)
        parser.add_argument("--config-dir", "-cd")
        parser.add_argument("overrides", nargs="*")
        try:
            given, unknown = parser.parse_known_intermixed_args(list(arguments))
        except SystemExit:  # argparse has already printed which flag lacks a value
            raise InputError("see --help") from None
        if unknown:
            raise InputError(_unknown_option_message(unknown[0]))
        if given.config_dir is not None and not Path(given.config_dir).is_dir():
            raise InputError(f"--config-dir {given.config_dir}: no such folder")
        is_help = given.help or given.prints or given.info is not None
        others = list(arguments)
        for override in given.overrides:
            others.remove(override)
        has_cfg = given.cfg is not None
        return cls(given.overrides, given.multirun, has_cfg, is_help, given.help, given.config_dir, tuple(others))

    @property
    def searchpath(self) -> List[str]:
        """Override that adds `config_dir` to the search path of the compose API; empty without --config-dir."""
        if self.config_dir is None:
            return []
        return [f"hydra.searchpath=[{quote(f'file://{Path(self.config_dir).absolute()}')}]"]

    def parse(self) -> List[Override]:
        """Parse the overrides with Hydra's grammar.

        Raises:
            HydraException: on an invalid override.
        """
        return list(OverridesParser.create().parse_overrides(self.overrides))

    def parse_each(self) -> List[Optional[Override]]:
        """Parse each override separately; an invalid one gives None."""
        parsed: List[Optional[Override]] = []
        for text in self.overrides:
            try:
                parsed.append(OverridesParser.create().parse_override(text))
            except HydraException:
                parsed.append(None)
        return parsed

    def sets(self, key: str) -> bool:
        """Return whether an override sets or deletes a key or group."""
        return any(override.key_or_group == key for override in self.parse())

    def sample_combinations(self, is_group: Callable[[str], bool]) -> List[List[str]]:
        """Return command lines without sweeps that together contain each name of every swept group (-m).

        Args:
            is_group: whether a key is a configuration group; values of other keys are checked when their job starts.
        """
        plain, sweeps = self._split()
        firsts = [values[0] for values in sweeps.values()]
        lines = [[*plain, *firsts]]
        for index, (key, values) in enumerate(sweeps.items()):
            more = values[1:] if is_group(key) else []
            lines += [[*plain, *firsts[:index], value, *firsts[index + 1 :]] for value in more]
        return lines

    def combinations(self) -> List[Tuple[List[str], List[str]]]:
        """Return (swept overrides, all overrides) of each combination of a sweep over lists (-m)."""
        plain, sweeps = self._split()
        return [(list(values), [*plain, *values]) for values in itertools.product(*sweeps.values())]

    def _split(self) -> Tuple[List[str], Dict[str, List[str]]]:
        """Return the plain overrides, and one override per value of each swept key; interval sweeps are left out."""
        plain: List[str] = []
        sweeps: Dict[str, List[str]] = {}
        for text, override in zip(self.overrides, self.parse()):
            if not override.is_sweep_override():
                plain.append(text)
            elif override.is_discrete_sweep():
                if isinstance(override.value(), Glob):
                    override.config_loader = config_loader(CONF_DIR, self.config_dir)
                values = [f"{text.split('=', 1)[0]}={value}" for value in override.sweep_string_iterator()]
                if not values:
                    raise InputError(f"{text}: matches no file of conf/{override.key_or_group}/ or of --config-dir")
                sweeps[override.key_or_group] = values
        return plain, sweeps


def suggest_command(typed: Sequence[str], command: str, *overrides: str) -> str:
    """Return another command with the configuration files (--config-dir) of the one that was typed."""
    flags = [f"--config-dir {folder}" for flag, folder in zip(typed, typed[1:]) if flag in ("--config-dir", "-cd")]
    flags += [word for word in typed if word.startswith("--config-dir=")]
    return " ".join([f"python -m lit_glm.{command}", *flags, *overrides])


def _unknown_option_message(flag: str) -> str:
    plain = flag.lstrip("-")
    key, _, value = plain.partition("=")
    better = suggest_key(key.replace("-", "_"), value, ()) if value else None
    if better is not None:
        return f"{flag}: unknown option; {better.partition('; ')[2] or better}"
    meant = f"; write {plain} without the dashes" if "=" in plain else "; keys are set as key=value, see --help"
    return f"{flag}: unknown option{meant}"
