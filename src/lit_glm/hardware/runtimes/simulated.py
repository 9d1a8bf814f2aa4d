"""A rehearsal without the chip: CPU devices that behave as cards. Nothing it measures is a figure of the chip."""

from typing import Optional

import torch

from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.cpu import CPURuntime


class SimulatedRuntime(CPURuntime):
    """Cards with indices and a memory size; tensors live on the CPU, gloo stands behind the backend."""

    name = "simulated"
    simulated = True
    shares_memory = False

    def __init__(self, cards: int, memory_gib: Optional[float]) -> None:
        """Pretend.

        Args:
            cards: devices of this node.
            memory_gib: memory of each.
        """
        super().__init__()
        self._cards = cards
        self._memory_gib = memory_gib

    def device_count(self) -> int:
        """As many as the topology asks for."""
        return self._cards

    def device(self, index: int) -> torch.device:
        """The CPU, for a card that exists."""
        if not 0 <= index < self._cards:
            raise InputError(f"card {index} does not exist: {self._cards} cards are simulated")
        return torch.device("cpu")

    def precision_hint(self, name: str) -> str:
        """Nothing: the time is no figure of the chip anyway."""
        return ""

    def device_name(self, index: int) -> str:
        """Says what it is."""
        return "simulated"

    def total_memory(self, index: int) -> Optional[float]:
        """That of the card that is simulated."""
        return None if self._memory_gib is None else self._memory_gib * 2**30
