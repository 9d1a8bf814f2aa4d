"""A DOUBLE of Kunlunxin's XPyTorch for tests: at import it patches torch.cuda, as the real one does.

As of the real one is known: torch.cuda answers for the cards, every card is called "GPU", the capability says (8, 6),
and torch_xmlir.xpu has no memory functions. It computes nothing. Needs torch 2.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch

AT_IMPORT = {name: os.environ.get(name) for name in ("BKCL_TIMEOUT", "XACC")}
_CARDS = int(os.environ.get("DOUBLE_CARDS", "2"))
_GIB = 2**30

_answers: Any = {
    "is_available": lambda: _CARDS > 0,
    "device_count": lambda: _CARDS,
    "get_device_name": lambda index: "GPU",
    "get_device_capability": lambda index=0: (8, 6),
    "max_memory_reserved": lambda index: 7 * _GIB,
    "memory_reserved": lambda index: 5 * _GIB,
    "get_device_properties": lambda index: SimpleNamespace(total_memory=32 * _GIB),
}
for _name, _answer in _answers.items():
    setattr(torch.cuda, _name, _answer)
