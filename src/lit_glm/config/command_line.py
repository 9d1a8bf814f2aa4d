"""A command line as Hydra reads it: its flags here, its overrides by Hydra's own grammar."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lit_glm.config.key_aliases import suggest_key
from lit_glm.errors import InputError


@dataclass
class CommandLine:
    """Flags and overrides."""

    overrides: List[str]
    multirun: bool = False
    cfg: bool = False
    """Whether the configuration is to be printed."""
    is_help: bool = False
    """Whether Hydra itself has to answer (help, info, completion): nothing is run."""
    config_dir: Optional[str] = None
    """The user's own folder of configuration."""
    flags: Tuple[str, ...] = ()
    """All that is no override, as it was typed."""

    @classmethod
    def read(cls, arguments: Sequence[str]) -> "CommandLine":
        """Read what stands behind the command's name.

        Raises:
            InputError: on a flag that does not exist.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flags in (("--help", "-h"), ("--hydra-help",), ("--version",), ("--shell-completion", "-sc")):
            parser.add_argument(*flags, dest="asks", action="store_true")
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
        except SystemExit:  # argparse has printed what is missing behind a flag
            raise InputError("see --help") from None
        if unknown:
            raise InputError(_unknown_option_message(unknown[0]))
        if given.config_dir is not None and not Path(given.config_dir).is_dir():
            raise InputError(f"--config-dir {given.config_dir}: there is no such folder")
        asks = given.asks or given.info is not None
        others = list(arguments)
        for override in given.overrides:
            others.remove(override)
        return cls(given.overrides, given.multirun, given.cfg is not None, asks, given.config_dir, tuple(others))

    @property
    def searchpath(self) -> List[str]:
        """Tells the compose API of the user's folder, as the flag tells Hydra's command line."""
        if self.config_dir is None:
            return []
        return [f"hydra.searchpath=['file://{Path(self.config_dir).absolute()}']"]

    def parse(self) -> List[Override]:
        """The overrides, read by Hydra's grammar.

        Raises:
            HydraException: on what is no override.
        """
        return list(OverridesParser.create().parse_overrides(self.overrides))

    def parse_each(self) -> List[Optional[Override]]:
        """The overrides one by one; None for what is none."""
        found: List[Optional[Override]] = []
        for text in self.overrides:
            try:
                found.append(OverridesParser.create().parse_override(text))
            except HydraException:
                found.append(None)
        return found

    def sets(self, key: str) -> bool:
        """Whether a key or group is set here, or taken away."""
        return any(override.key_or_group == key for override in self.parse())

    def sample_combinations(self, is_group: Callable[[str], bool]) -> List[List[str]]:
        """For -m: command lines without sweeps, in which each name of a swept group stands once.

        Args:
            is_group: whether a key is a configuration group; values of others are checked when their turn comes.
        """
        plain, sweeps = self._split()
        firsts = [values[0] for values in sweeps.values()]
        lines = [[*plain, *firsts]]
        for place, (key, values) in enumerate(sweeps.items()):
            more = values[1:] if is_group(key) else []
            lines += [[*plain, *firsts[:place], value, *firsts[place + 1 :]] for value in more]
        return lines

    def combinations(self) -> List[Tuple[List[str], List[str]]]:
        """For -m over lists: of each combination what is its own, and its whole command line."""
        plain, sweeps = self._split()
        return [(list(own), [*plain, *own]) for own in itertools.product(*sweeps.values())]

    def _split(self) -> Tuple[List[str], Dict[str, List[str]]]:
        """Overrides that are not swept, and of each key that is, an override a value; searches are left out."""
        plain: List[str] = []
        sweeps: Dict[str, List[str]] = {}
        for text, override in zip(self.overrides, self.parse()):
            if not override.is_sweep_override():
                plain.append(text)
            elif override.is_discrete_sweep():
                values = override.sweep_string_iterator()
                sweeps[override.key_or_group] = [f"{text.split('=', 1)[0]}={value}" for value in values]
        return plain, sweeps


def _unknown_option_message(flag: str) -> str:
    plain = flag.lstrip("-")
    key, _, value = plain.partition("=")
    better = suggest_key(key.replace("-", "_"), value, ()) if value else None
    if better is not None:
        return f"{flag}: there is no such option; {better.partition('; ')[2] or better}"
    meant = f"; write {plain} without the dashes" if "=" in plain else "; keys are set as key=value, see --help"
    return f"{flag}: there is no such option{meant}"
