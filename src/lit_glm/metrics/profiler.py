"""`callbacks=profile`: torch's profiler over a few steps, memory by kind in the next step, summarised in kernels.md."""

import logging
import os
import pickle
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from lit_glm.atomic_files import atomic_write, write_text
from lit_glm.compat import storage_of
from lit_glm.data.memmap_dataset import SequenceLengths
from lit_glm.errors import InputError
from lit_glm.metrics.benchmark_callback import BenchmarkCallback, find_benchmark_callback
from lit_glm.metrics.memory_estimate import MemoryEstimate, check_memory
from lit_glm.runs.result import markdown_table

log = logging.getLogger(__name__)

_MAX_TABLE_ROWS = 25
_WAITS = ("Synchronize", "_local_scalar_dense", "aten::is_nonzero")
"""Parts of the names of host waits: the runtimes' own functions, and operators that read a value."""
_GIB = 2**30


@dataclass
class ProfileEntry:
    """Calls of one name over all profiled steps."""

    name: str
    calls: int
    seconds: float
    """Self time without callees; total time for `ProfileSummary.waits`."""


@dataclass
class ProfileSummary:
    """Summary of the profiled steps."""

    first: int
    last: int
    operators: List[ProfileEntry]
    """Operators on the host."""
    kernels: List[ProfileEntry]
    """Kernels on the device; empty without a device."""
    waits: List[ProfileEntry]
    window: float
    """Seconds from the first to the last event."""
    busy: float
    """Seconds of `window` during which the device (without one: an operator) was busy."""

    @classmethod
    def of(cls, profiler: Any, first: int, last: int) -> "ProfileSummary":
        """Summarise a profiler that has stopped."""
        averages = [average for average in profiler.key_averages() if not average.key.startswith("ProfilerStep")]
        operators = [
            ProfileEntry(a.key, a.count, a.self_cpu_time_total / 1e6) for a in averages if a.self_cpu_time_total > 0
        ]
        on_device: Dict[str, ProfileEntry] = {}
        host, device = [], []
        for event in profiler.events():
            if getattr(event, "is_user_annotation", False):
                continue  # a time span named by a user annotation: its contents are counted themselves
            span = (event.time_range.start, event.time_range.end)
            if str(event.device_type).endswith("CPU"):
                host.append(span)
                continue
            device.append(span)
            entry = on_device.setdefault(event.name, ProfileEntry(event.name, 0, 0.0))
            entry.calls += 1
            entry.seconds += (span[1] - span[0]) / 1e6
        every = host + device
        window = (max(end for _, end in every) - min(start for start, _ in every)) / 1e6 if every else 0.0
        waits = _outermost_waits(profiler.events())
        ordered = sorted(on_device.values(), key=lambda entry: -entry.seconds)
        operators.sort(key=lambda entry: -entry.seconds)
        return cls(first, last, operators, ordered, waits, window, _covered_length(device or host) / 1e6)

    @property
    def count(self) -> int:
        """Number of profiled steps."""
        return self.last - self.first + 1


def _is_wait(name: str) -> bool:
    return any(word in name for word in _WAITS)


def _outermost_waits(events: Any) -> List[ProfileEntry]:
    """Collect host waits that are not nested in another: an operator that reads a value calls a runtime's wait."""
    waits: Dict[str, ProfileEntry] = {}
    for event in events:
        if not _is_wait(event.name) or not str(event.device_type).endswith("CPU"):
            continue
        parent = event.cpu_parent
        while parent is not None and not _is_wait(parent.name):
            parent = parent.cpu_parent
        if parent is None:
            entry = waits.setdefault(event.name, ProfileEntry(event.name, 0, 0.0))
            entry.calls += 1
            entry.seconds += event.cpu_time_total / 1e6
    return list(waits.values())


def _covered_length(spans: List[Tuple[float, float]]) -> float:
    """Return the length of the union of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _profile_table(title: str, entries: List[ProfileEntry], steps: int) -> List[str]:
    total = sum(entry.seconds for entry in entries)
    rows = [["name", "share", "ms per step", "calls per step", "us per call"]]
    rows += [
        [
            f"`{entry.name[:80]}`",
            f"{entry.seconds / total:.1%}" if total else "",
            f"{1000 * entry.seconds / steps:.3f}",
            f"{entry.calls / steps:g}",
            f"{1e6 * entry.seconds / entry.calls:.1f}",
        ]
        for entry in entries[:_MAX_TABLE_ROWS]
    ]
    rest = entries[_MAX_TABLE_ROWS:]
    if rest:
        seconds, calls = sum(entry.seconds for entry in rest), sum(entry.calls for entry in rest)
        share = f"{seconds / total:.1%}" if total else ""
        rows.append([f"{len(rest)} others", share, f"{1000 * seconds / steps:.3f}", f"{calls / steps:g}", ""])
    return [f"## {title}", "", f"{1000 * total / steps:.2f} ms per step in total.", "", markdown_table(rows), ""]


def _memory_table(kinds: Dict[str, float], estimate: MemoryEstimate, peak: Optional[float]) -> List[str]:
    if not kinds:
        return ["## Memory", "", "Not measured: the run ended before the step after the profiled ones.", ""]
    has_update = "gradients" in kinds  # a step without an update has none
    training = kinds["gradients"] + kinds.get("optimizer", 0.0) if has_update else None
    pairs = [
        ("weights", kinds.get("weights"), estimate.weights),
        ("gradients", kinds.get("gradients"), None),
        ("optimizer (state; fp16: also master weights)", kinds.get("optimizer"), None),
        ("gradients and optimizer", training, estimate.training),
        ("activations saved for the backward pass", kinds.get("activations"), estimate.activations),
        ("in use before the model", None, estimate.base),
        ("peak of the device", peak, estimate.total),
    ]
    rows = [["kind", "measured GiB", "estimated GiB"]]
    rows += [[name, _format_gib(counted), _format_gib(estimated)] for name, counted, estimated in pairs]
    note = "Measured in one step; the estimate is for the largest batch of the data."
    return ["## Memory by kind", "", note, "", markdown_table(rows), ""]


def _format_gib(value: Optional[float]) -> str:
    return "" if value is None else f"{value / _GIB:.4f}"


def profile_markdown(
    summary: ProfileSummary, kinds: Dict[str, float], estimate: MemoryEstimate, peak: Optional[float]
) -> str:
    """Format kernels.md.

    Args:
        summary: summary of the profiled steps.
        kinds: bytes of weights, gradients, optimizer, activations; empty: not measured.
        estimate: memory estimate made before the run.
        peak: highest memory in use on the device, bytes.
    """
    share = summary.busy / summary.window if summary.window else 0.0
    subject = "the device was busy" if summary.kernels else "an operator was running (no separate device was seen)"
    waits = sum(entry.calls for entry in summary.waits)
    lines = [
        f"# Profile of steps {summary.first} to {summary.last}",
        "",
        "The profiler adds overhead: shares are reliable, absolute times are longer than in a run without it.",
        "Times are self times, without callees. Open `trace.json` in chrome://tracing or ui.perfetto.dev.",
        "",
        f"- {1000 * summary.window / summary.count:.2f} ms per step; {subject} {share:.1%} of it, "
        f"gaps are {1 - share:.1%}",
        *([f"- {waits / summary.count:g} host waits for the device per step"] if summary.kernels else []),
        "",
        *_profile_table("Operators on the host", summary.operators, summary.count),
    ]
    if summary.kernels:
        lines += _profile_table("Kernels on the device", summary.kernels, summary.count)
    if summary.waits and summary.kernels:
        lines += _profile_table("Host waits (including callees)", summary.waits, summary.count)
    return "\n".join([*lines, *_memory_table(kinds, estimate, peak)])


FOLDER = "profile"
DOCUMENT = "kernels.md"
_IDLE, _PROFILING, _COUNTING, _DONE = range(4)


class ProfilerCallback(pl.Callback):
    """Callback that profiles rank 0; the other ranks train without a profiler."""

    def __init__(self, from_step: int = 10, steps: int = 5) -> None:
        """Select the steps to profile.

        Args:
            from_step: the first profiled step, counted from 1.
            steps: number of profiled steps.

        Raises:
            InputError: if one of them is below 1.
        """
        for name, value in (("from_step", from_step), ("steps", steps)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"callbacks.profile.{name}={value}: must be an integer >= 1")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its console output is for developers of profilers
        self._from_step, self._count = from_step, steps
        self._state = _DONE
        self._profiler: Any = None
        self._first = 0
        self._summary: Optional[ProfileSummary] = None
        self._hooks = ExitStack()
        self._storages: Dict[int, int] = {}
        self._known_storages: Set[int] = set()
        self._kinds: Dict[str, float] = {}
        self._folder = Path()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Enable profiling on rank 0, unless a resumed run already has a profile."""
        self._folder = Path(trainer.default_root_dir) / FOLDER
        if trainer.is_global_zero and not (self._folder / DOCUMENT).is_file():
            self._state = _IDLE

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the profiler, or the memory measurement."""
        step = pl_module.steps_done + 1
        if self._state == _IDLE and self._summary is None and step >= self._from_step:
            self._state, self._first = _PROFILING, step
            self._profiler = torch.profiler.profile(activities=torch.profiler.supported_activities())
            self._profiler.start()
        elif self._state == _IDLE and self._summary is not None:
            self._state = _COUNTING
            known = [_storage_bytes(tensor) for tensor in pl_module.state_dict().values()]
            if None in known:
                log.info("profile: memory by kind is not available: tensors of this device have no storage")
                self._write(trainer)
                return
            self._known_storages = {entry[0] for entry in known if entry is not None}
            self._hooks.enter_context(
                torch.autograd.graph.saved_tensors_hooks(self._record_saved_tensor, lambda tensor: tensor)
            )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Measure activation memory at its peak, when everything that backward needs has been saved."""
        if self._state != _COUNTING:
            return
        self._hooks.close()
        self._kinds["activations"] = float(sum(self._storages.values()))
        snapshot = find_benchmark_callback(trainer).runtime.memory_snapshot()
        if snapshot is not None:
            self._folder.mkdir(exist_ok=True)
            with atomic_write(self._folder / "memory_snapshot.pickle") as temporary, temporary.open("wb") as file:
                pickle.dump({"segments": snapshot, "device_traces": []}, file)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Record the bytes of weights, gradients and master weights."""
        if self._state == _COUNTING:
            updated = [p for group in optimizer.param_groups for p in group["params"]]
            weights = list(pl_module.parameters())
            weight_ids = {id(parameter) for parameter in weights}
            masters = [parameter for parameter in updated if id(parameter) not in weight_ids]
            self._kinds["weights"] = _total_bytes(weights)
            self._kinds["gradients"] = _total_bytes([p.grad for p in [*weights, *masters] if p.grad is not None])
            self._kinds["optimizer"] = _total_bytes(masters)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Finish the profile or the memory measurement."""
        if self._state == _PROFILING and pl_module.steps_done >= self._first + self._count - 1:
            self._end_profile(pl_module.steps_done)
        elif self._state == _COUNTING:
            self._hooks.close()
            for optimizer in trainer.optimizers:
                state = [value for entry in optimizer.state.values() for value in entry.values()]
                tensors = [value for value in state if isinstance(value, Tensor)]
                self._kinds["optimizer"] = self._kinds.get("optimizer", 0.0) + _total_bytes(tensors)
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write what was measured if the run ended early."""
        if self._state == _PROFILING:
            self._end_profile(pl_module.steps_done)
        if self._state == _IDLE and self._summary is not None:
            self._write(trainer)
        elif self._state == _IDLE:
            log.info(
                f"callbacks=profile: no step was profiled: the run ended after step {pl_module.steps_done}, "
                f"before callbacks.profile.from_step={self._from_step}"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Stop the profiler and remove hooks, also after a failure in a profiled step."""
        self._hooks.close()
        if self._state == _PROFILING:
            self._profiler.stop()
        self._state = _DONE

    # -- what is written -----------------------------------------------------------------------------------------

    def _end_profile(self, step: int) -> None:
        self._profiler.stop()
        self._folder.mkdir(exist_ok=True)
        with atomic_write(self._folder / "trace.json") as temporary:
            self._profiler.export_chrome_trace(str(temporary))
        self._summary = ProfileSummary.of(self._profiler, self._first, step)
        self._profiler, self._state = None, _IDLE

    def _write(self, trainer: Any) -> None:
        self._state = _DONE
        benchmark: BenchmarkCallback = find_benchmark_callback(trainer)
        estimate: MemoryEstimate = check_memory(
            benchmark.config,
            SequenceLengths.from_dataset(trainer.datamodule.split),
            benchmark.runtime,
            base=benchmark.memory_base,
        ).estimate
        assert self._summary is not None
        text = profile_markdown(self._summary, self._kinds, estimate, benchmark.runtime.peak_memory(0))
        write_text(self._folder / DOCUMENT, text)
        log.info(f"profile of steps {self._summary.first} to {self._summary.last}: {self._folder}/{DOCUMENT}")

    def _record_saved_tensor(self, tensor: Tensor) -> Tensor:
        known = _storage_bytes(tensor)
        if known is not None and known[0] not in self._known_storages:
            self._storages[known[0]] = known[1]
        return tensor


def _storage_bytes(tensor: Tensor) -> Optional[Tuple[int, int]]:
    """Return address and size of a tensor's storage; None on devices without storages, such as lazy ones."""
    try:
        storage = storage_of(tensor)
        return int(storage.data_ptr()), int(storage.nbytes())
    except (RuntimeError, NotImplementedError):
        return None


def _total_bytes(tensors: List[Any]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
