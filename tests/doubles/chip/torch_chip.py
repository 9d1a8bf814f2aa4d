"""A device type for tests, "chip", and its runtimes. No figure that it gives is a measurement of any hardware.

`chip_device.cpp` gives it two devices with memory that CPU code must not touch. This module computes, by copies to the
CPU, in one of two ways:

- `Chip`: each operation at once.
- `LazyChip`: operations are recorded. They run at a barrier or when the host reads a tensor, and are dropped if nothing
  refers to what they write.

The device has its own generator. Its process group copies to the CPU and uses gloo, which supports no other devices.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional, Set

import torch
from torch.utils._pytree import tree_flatten, tree_map

from lit_glm.hardware.runtimes.base import Runtime

LIBRARY = "CHIP_LIBRARY"
"""Variable with the path of the library built from chip_device.cpp."""


def _is_on_chip(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "chip"


def _tensors(tree: Any) -> List[torch.Tensor]:
    return [value for value in tree_flatten(tree)[0] if isinstance(value, torch.Tensor)]


def _like(value: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _alias(value: Any) -> Any:
    """Return a tensor with the same memory and no graph."""
    if not _is_on_chip(value):
        return value
    with torch._C._AutoDispatchBelowAutograd():
        return value.detach()


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def _written_arguments(operator: Any, args: Any, kwargs: Any) -> List[torch.Tensor]:
    arguments = operator._schema.arguments
    given = [*zip(arguments, args), *((entry, kwargs[entry.name]) for entry in arguments if entry.name in kwargs)]
    return _tensors([value for entry, value in given if entry.alias_info is not None and entry.alias_info.is_write])


class _DeviceGenerator:
    """Context in which an operator of the CPU draws from the device's generator instead of the host's."""

    def __init__(self, operator: Any, generator: torch.Generator) -> None:
        self._draws = torch.Tag.nondeterministic_seeded in operator.tags
        self._generator = generator

    def __enter__(self) -> None:
        if self._draws:
            self._host = torch.default_generator.get_state()
            torch.default_generator.set_state(self._generator.get_state())

    def __exit__(self, *_: Any) -> None:
        if self._draws:
            self._generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(self._host)


def _compute(operator: Any, args: Any, kwargs: Any, generator: torch.Generator) -> Any:
    """Compute an operator on copies in the memory of the CPU, and copy back the arguments that it writes."""
    copies: Dict[int, torch.Tensor] = {}

    def to_host(value: Any) -> Any:
        if not _is_on_chip(value):
            return torch.device("cpu") if isinstance(value, torch.device) else value
        if id(value) not in copies:
            copies[id(value)] = torch.empty_like(value, device="cpu")  # of its own layout: a view may overlap itself
            torch.ops.chip.copy(value, copies[id(value)])
        return copies[id(value)]

    on_host = tree_map(to_host, (args, kwargs))
    with _DeviceGenerator(operator, generator):
        result = operator(*on_host[0], **on_host[1])
    for value in _written_arguments(operator, args, kwargs):
        if value.shape != copies[id(value)].shape:  # an `out` that the operator has resized
            value.resize_(copies[id(value)].shape)
        torch.ops.chip.copy(copies[id(value)], value)
    return result


@dataclass
class Recorded:
    """An operation that has not run yet."""

    run: Callable[[], None]
    tensors: List[torch.Tensor]
    """Aliases of all tensors that it uses: the only references of this record to their memory."""
    written: Set[int] = field(default_factory=set)
    """Memory that it writes."""


class Engine:
    """Runs operations at once, or records them until what they write is needed."""

    def __init__(self) -> None:
        self.is_lazy = False
        self.generator = torch.Generator()
        self.pending: List[Recorded] = []
        self.num_run = self.num_dropped = 0

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """Run or record an operator that has no kernel in chip_device.cpp."""
        if any(value.device.type == "cpu" and value.dim() > 0 for value in _tensors((args, kwargs))):
            raise RuntimeError(f"{operator}: expected all tensors on the chip, found one on the CPU")
        kinds = [str(entry.type) for entry in operator._schema.arguments]  # torch passes numbers for scalar tensors
        args = tuple(
            torch.tensor(value) if kind == "Tensor" and isinstance(value, (bool, int, float)) else value
            for value, kind in zip(args, kinds)
        )
        written = _written_arguments(operator, args, kwargs)
        if self.is_lazy and all(value.numel() > 0 for value in written):
            outputs = [] if written else self._shapes(operator, args, kwargs)
            if outputs is not None:
                outputs = tree_map(lambda value: _like(value, "chip"), outputs)
                self._record(operator, args, kwargs, _tensors(outputs))
                return self._returned(operator, written, outputs)
        self.barrier()
        result = _compute(operator, args, kwargs, self.generator)
        if written:
            return self._returned(operator, written, result)

        def to_chip(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            there = _like(value, "chip")
            torch.ops.chip.copy(value, there)
            return there

        return tree_map(to_chip, result)

    @staticmethod
    def _returned(operator: Any, written: List[torch.Tensor], result: Any) -> Any:
        """Return what an operator returns: the tensors that it writes, or its result."""
        returns = operator._schema.returns
        if not written or not returns:
            return result if returns else None
        return written[0] if len(returns) == 1 else tuple(written)

    @staticmethod
    def _shapes(operator: Any, args: Any, kwargs: Any) -> Optional[Any]:
        """Return the results as tensors without memory; None if the operator has to run now."""

        def to_meta(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("meta")
            return _like(value, "meta") if _is_on_chip(value) else value

        try:
            found = operator(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
        except (RuntimeError, NotImplementedError):
            return None  # the shape depends on values, or the arguments are invalid
        leaves = tree_flatten(found)[0]
        return found if leaves and all(isinstance(value, torch.Tensor) for value in leaves) else None

    def _record(self, operator: Any, args: Any, kwargs: Any, outputs: List[torch.Tensor]) -> None:
        args, kwargs, outputs = tree_map(_alias, (args, kwargs, outputs))

        def run() -> None:
            for result, output in zip(_tensors(_compute(operator, args, kwargs, self.generator)), outputs):
                torch.ops.chip.copy(result, output)

        written = {_storage(value) for value in [*outputs, *_written_arguments(operator, args, kwargs)]}
        used = [value for value in _tensors((args, kwargs, outputs)) if _is_on_chip(value)]
        self.pending.append(Recorded(run, used, written))

    def copy(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Copy between host and device, or on a device (`aten::_copy_from`)."""
        if self.is_lazy and _is_on_chip(target):
            kept, there = (_alias(source) if _is_on_chip(source) else source.clone()), _alias(target)
            used = [value for value in (kept, there) if _is_on_chip(value)]
            self.pending.append(Recorded(lambda: torch.ops.chip.copy(kept, there), used, {_storage(there)}))
        else:
            self.barrier()
            torch.ops.chip.copy(source, target)
        return target

    def state(self) -> torch.Tensor:
        """Return the state of the generator after all operations so far."""
        self.barrier()
        return self.generator.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        """Set the state of the generator for the operations that follow."""
        self.barrier()
        self.generator.set_state(state)

    def barrier(self) -> None:
        """Run the recorded operations that are needed; drop those that write only to memory that nobody refers to."""
        recorded, self.pending = self.pending, []
        held: Dict[int, int] = {}
        for entry in recorded:
            for value in {id(value): value for value in entry.tensors}.values():
                held[_storage(value)] = held.get(_storage(value), 0) + 1
        needed = {
            place
            for entry in recorded
            for value in entry.tensors
            for place in [_storage(value)]
            if torch._C._storage_Use_Count(place) > held[place] + 1  # one is Python's object for the storage
        }
        kept: List[Recorded] = []
        for entry in reversed(recorded):
            if entry.written & needed:
                needed |= {_storage(value) for value in entry.tensors}
                kept.append(entry)
        self.num_run, self.num_dropped = self.num_run + len(kept), self.num_dropped + len(recorded) - len(kept)
        for entry in reversed(kept):
            entry.run()


ENGINE = Engine()


class _Work(torch.distributed._Work):
    """A collective that has completed."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class ChipGroup(torch.distributed.ProcessGroup):
    """Process group whose collectives run on copies in the memory of the CPU, by gloo."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = torch.distributed.ProcessGroupGloo(store, rank, size, timeout)

    def _on_host(self, tensors: List[torch.Tensor], call: Callable[[List[torch.Tensor]], Any]) -> _Work:
        copies = [value.cpu() for value in tensors]
        call(copies).wait()
        for value, copied in zip(tensors, copies):
            value.copy_(copied)
        return _Work(tensors)

    def allreduce(self, tensors: Any, opts: Any = None) -> _Work:
        return self._on_host(tensors, lambda copies: self._gloo.allreduce(copies, opts))

    def broadcast(self, tensors: Any, opts: Any = None) -> _Work:
        return self._on_host(tensors, lambda copies: self._gloo.broadcast(copies, opts))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> _Work:
        copies = [[value.cpu() for value in row] for row in outputs]
        self._gloo.allgather(copies, [value.cpu() for value in inputs]).wait()
        for row, copied in zip(outputs, copies):
            for value, there in zip(row, copied):
                value.copy_(there)
        return _Work(outputs)

    def barrier(self, opts: Any = None) -> _Work:
        self._gloo.barrier().wait()
        return _Work([])

    def getBackendName(self) -> str:
        return "chipccl"


def _module() -> ModuleType:
    """Return what becomes `torch.chip`."""
    found: Any = ModuleType("chip")
    found.is_available = lambda: True
    found.is_initialized = lambda: True
    found._is_in_bad_fork = lambda: False
    found.device_count = torch.ops.chip.device_count
    found.current_device = torch.ops.chip.current_device
    found.set_device = torch.ops.chip.set_device
    found.manual_seed = found.manual_seed_all = ENGINE.generator.manual_seed
    found._initialized = True  # else torch.utils.checkpoint restores no random state
    found.device = lambda index: nullcontext()
    found.get_rng_state = lambda device=None: ENGINE.state()
    found.set_rng_state = lambda state, device=None: ENGINE.set_state(state)
    found.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return found


def load() -> None:
    """Register the device type, once per process."""
    if hasattr(torch, "chip"):
        return
    torch.ops.load_library(os.environ[LIBRARY])
    torch.utils.rename_privateuse1_backend("chip")
    torch._register_device_module("chip", _module())
    torch.ops.chip.register_hooks()
    torch.utils.generate_methods_for_privateuse1_backend()
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(ENGINE.call, "PrivateUse1")
    aten.impl("_copy_from", ENGINE.copy, "PrivateUse1")
    aten.impl("_copy_from_and_resize", ENGINE.copy, "PrivateUse1")
    aten.impl("_local_scalar_dense", lambda value: value.cpu().item(), "PrivateUse1")
    _libraries.extend((every, aten))
    torch.distributed.Backend.register_backend("chipccl", ChipGroup, devices=["chip"])


_libraries: List[Any] = []  # a registration lasts as long as its library


class Chip(Runtime):
    """Runtime of the device that computes each operation at once."""

    name = "chip"
    backend = "chipccl"
    lazy = False

    @staticmethod
    def unavailable_reason() -> Optional[str]:
        return None if os.environ.get(LIBRARY) else f"chip_device.cpp is not built ({LIBRARY} is not set)"

    def __init__(self) -> None:
        load()
        ENGINE.is_lazy = self.lazy

    def device_count(self) -> int:
        return int(torch.ops.chip.device_count())

    def device(self, index: int) -> torch.device:
        return torch.device("chip", index)

    def set_device(self, index: int) -> None:
        torch.ops.chip.set_device(index)

    def device_name(self, index: int) -> str:
        return "test chip"

    def synchronize(self) -> None:
        ENGINE.barrier()

    def manual_seed(self, seed: int) -> None:
        super().manual_seed(seed)
        ENGINE.generator.manual_seed(seed)

    def memory_in_use(self, index: int) -> Optional[float]:
        return float(torch.ops.chip.memory(index)[0])

    def peak_memory(self, index: int) -> Optional[float]:
        return float(torch.ops.chip.memory(index)[1])

    def total_memory(self, index: int) -> Optional[float]:
        return float(torch.ops.chip.memory(index)[2])


class LazyChip(Chip):
    """Runtime of the device that records operations; a step ends with a barrier."""

    name = "lazy chip"
    lazy = True

    def after_step(self) -> None:
        ENGINE.barrier()
