"""A DOUBLE of Kunlunxin's torch_xmlir for tests: the calls of the real one, on the CPU. It measures nothing.

As of the real one is known: switches are read once, at import; a device is made by `device("xpu:N")`; "xccl" is a
backend of torch.distributed, here gloo; memory functions are missing. Needs torch 1.12 (later ones have an "xccl" of
their own, Intel's).
"""

import os

import torch

from torch_xmlir import xpu

SWITCHES = {name: os.environ.get(name) for name in ("XACC", "XACC_ARGS", "XMLIR_D_XPU_L3_SIZE", "BKCL_PCIE_RING")}


def device(name: str) -> torch.device:
    """xpu:N -> the CPU, which has no index; as strict as the real one about what a card is."""
    kind, _, index = name.partition(":")
    if kind != "xpu" or not index.isdigit() or int(index) >= xpu.device_count():
        raise RuntimeError(f"invalid device {name!r}: {xpu.device_count()} XPU visible")
    return torch.device("cpu")


def _xccl(store: object, rank: int, size: int, timeout: object) -> object:
    if xpu.current_device() != int(os.environ.get("LOCAL_RANK", "0")):
        raise RuntimeError("xccl: set_device(LOCAL_RANK) must come before init_process_group")
    return torch.distributed.ProcessGroupGloo(store, rank, size, timeout=timeout)


if not hasattr(torch.distributed.Backend, "XCCL"):  # a second registration asserts
    torch.distributed.Backend.register_backend("xccl", _xccl)
