"""The words of the document (i18n.yaml) in one language."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_WORDS: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("i18n.yaml")))
_STATES = ("success", "finished", "running", "killed", "interrupted", "failed")
_NODES = {1: "单机", 2: "两机", 3: "三机", 4: "四机"}


class Translations:
    """The words of one language: `words("missing_cell", row, name)`."""

    def __init__(self, language: str) -> None:
        self.language = language

    def __call__(self, key: str, *values: Any) -> str:
        """A text, its places filled in; values are put in as they are, braces and all."""
        text = _WORDS[key][self.language]
        return text.format(*values) if values else text

    def state(self, status: str) -> str:
        """How a run stands, where there is a word for it."""
        return self(status) if status in _STATES else status

    def config(self, card: str, topology: str) -> str:
        """Name of a row: `CARD 1x8`; in Chinese as published, `CARD单机8卡（1x8）`."""
        nodes, _, devices = topology.partition("x")
        if self.language == "en" or not (nodes.isdecimal() and devices.isdecimal()):
            return f"{card} {topology}"
        machines = _NODES.get(int(nodes), f"{nodes}机")
        return f"{card}{machines}{'单' if devices == '1' else devices}卡（{topology}）"
