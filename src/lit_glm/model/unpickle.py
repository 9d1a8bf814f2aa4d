"""Reads torch files without executing code from them, where torch itself cannot (before 2.x: no weights_only).

A file may name only tensors, plain containers, and the few numpy and random-state types that THUDM's own code
saves beside the weights; anything else is refused by name before it is called.
"""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from lit_glm.errors import InputError

_TORCH = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}
_STORAGES = {
    f"{name}Storage"
    for name in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
}
_NUMPY = {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def _allowed(module: str, name: str) -> Any:
    if module == "collections" and name == "OrderedDict":
        return OrderedDict
    if module == "torch" and (name in _STORAGES or isinstance(getattr(torch, name, None), torch.dtype)):
        return getattr(torch, name)
    if module == "torch.storage" and name in ("_TypedStorage", "_UntypedStorage", "TypedStorage", "UntypedStorage"):
        return getattr(torch.storage, name, None)
    if (module, name) in _TORCH or (module, name) in _NUMPY:
        if module.startswith("numpy._core"):
            module = module.replace("numpy._core", "numpy.core")
        return getattr(__import__(module, fromlist=[name]), name)
    if module.startswith("numpy.dtypes") or (module == "builtins" and name in ("set", "frozenset", "complex")):
        return getattr(__import__(module, fromlist=[name]), name)
    return None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _allowed(module, name)
        if found is None:
            raise InputError(f"it names {module}.{name}, which a checkpoint has no need of; nothing was executed")
        return found


class _Module:
    """Stands in for the pickle module where torch asks for one."""

    Unpickler = _Unpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: Any, **_: Any) -> Any:
        return _Unpickler(file).load()


def restricted_load(path: Path) -> Any:
    """torch.load onto the CPU through the restricted unpickler.

    Raises:
        InputError: if the file names something that is not allowed.
    """
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", pickle_module=_Module)
