"""What torch's profiler has seen of a few steps, as tables: operators, kernels, waits of the host, gaps, memory."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

from lit_glm.bench.memory import Estimate
from lit_glm.runs.row import lines_of

_SHOWN = 25
_WAITS = ("Synchronize", "_local_scalar_dense", "aten::is_nonzero")
"""What the host waits in: the runtimes' own functions, and the operator that reads a value."""
_GIB = 2**30


@dataclass
class Entry:
    """Calls of one name, over all steps."""

    name: str
    calls: int
    seconds: float
    """Its own, without what it calls."""


@dataclass
class Steps:
    """What was seen."""

    first: int
    last: int
    operators: List[Entry]
    """On the host."""
    kernels: List[Entry]
    """On the device; empty without one."""
    waits: List[Entry]
    window: float
    """Seconds from the first to the last event."""
    busy: float
    """Of these, during which the device (without one: an operator) was at work."""

    @classmethod
    def of(cls, profiler: Any, first: int, last: int) -> "Steps":
        """Read a profiler that has stopped.

        Args:
            profiler: torch's.
            first: step that it saw first.
            last: step that it saw last.
        """
        averages = [average for average in profiler.key_averages() if not average.key.startswith("ProfilerStep")]
        operators = [Entry(a.key, a.count, a.self_cpu_time_total / 1e6) for a in averages if a.self_cpu_time_total > 0]
        on_device: Dict[str, Entry] = {}
        host, device = [], []
        for event in profiler.events():
            if getattr(event, "is_user_annotation", False):
                continue  # a name that somebody has given to a stretch of time: what is inside counts by itself
            span = (event.time_range.start, event.time_range.end)
            if str(event.device_type).endswith("CPU"):
                host.append(span)
                continue
            device.append(span)
            entry = on_device.setdefault(event.name, Entry(event.name, 0, 0.0))
            entry.calls += 1
            entry.seconds += (span[1] - span[0]) / 1e6
        every = host + device
        window = (max(end for _, end in every) - min(start for start, _ in every)) / 1e6 if every else 0.0
        waits = _outermost(profiler.events())
        ordered = sorted(on_device.values(), key=lambda entry: -entry.seconds)
        operators.sort(key=lambda entry: -entry.seconds)
        return cls(first, last, operators, ordered, waits, window, _union(device or host) / 1e6)

    @property
    def count(self) -> int:
        """Steps."""
        return self.last - self.first + 1


def _waits(name: str) -> bool:
    return any(word in name for word in _WAITS)


def _outermost(events: Any) -> List[Entry]:
    """Waits of the host that are inside no other: reading a value is an operator that waits by a runtime's function."""
    found: Dict[str, Entry] = {}
    for event in events:
        if not _waits(event.name) or not str(event.device_type).endswith("CPU"):
            continue
        parent = event.cpu_parent
        while parent is not None and not _waits(parent.name):
            parent = parent.cpu_parent
        if parent is None:
            entry = found.setdefault(event.name, Entry(event.name, 0, 0.0))
            entry.calls += 1
            entry.seconds += event.cpu_time_total / 1e6
    return list(found.values())


def _union(spans: List[Tuple[float, float]]) -> float:
    """Length of what at least one span covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _table(title: str, entries: List[Entry], steps: int) -> List[str]:
    whole = sum(entry.seconds for entry in entries)
    rows = [["name", "share", "ms a step", "calls a step", "us a call"]]
    rows += [
        [
            f"`{entry.name[:80]}`",
            f"{entry.seconds / whole:.1%}" if whole else "",
            f"{1000 * entry.seconds / steps:.3f}",
            f"{entry.calls / steps:g}",
            f"{1e6 * entry.seconds / entry.calls:.1f}",
        ]
        for entry in entries[:_SHOWN]
    ]
    rest = entries[_SHOWN:]
    if rest:
        seconds, calls = sum(entry.seconds for entry in rest), sum(entry.calls for entry in rest)
        share = f"{seconds / whole:.1%}" if whole else ""
        rows.append([f"{len(rest)} others", share, f"{1000 * seconds / steps:.3f}", f"{calls / steps:g}", ""])
    return [f"## {title}", "", f"{1000 * whole / steps:.2f} ms a step in all.", "", lines_of(rows), ""]


def _memory(kinds: Dict[str, float], guess: Estimate, peak: Optional[float]) -> List[str]:
    if not kinds:
        return ["## Memory", "", "Not counted: the run ended before the step behind the profiled ones.", ""]
    whole = "gradients" in kinds  # a step without an update has none where the optimizer looks
    training = kinds["gradients"] + kinds.get("optimizer", 0.0) if whole else None
    pairs = [
        ("weights", kinds.get("weights"), guess.weights),
        ("gradients", kinds.get("gradients"), None),
        ("optimizer (its state; fp16: masters too)", kinds.get("optimizer"), None),
        ("gradients and optimizer", training, guess.training),
        ("activations kept for the backward pass", kinds.get("activations"), guess.activations),
        ("in use before the model", None, guess.base),
        ("peak of the device", peak, guess.total),
    ]
    rows = [["kind", "measured GiB", "estimated GiB"]]
    rows += [[name, _gib(own), _gib(other)] for name, own, other in pairs]
    note = "Measured in one step; the estimate is of the largest batch in the data."
    return ["## Memory by kind", "", note, "", lines_of(rows), ""]


def _gib(value: Optional[float]) -> str:
    return "" if value is None else f"{value / _GIB:.4f}"


def kernels_document(found: Steps, kinds: Dict[str, float], guess: Estimate, peak: Optional[float]) -> str:
    """kernels.md.

    Args:
        found: what the profiler saw.
        kinds: bytes of weights, gradients, optimizer, activations; empty: not counted.
        guess: the estimate before the run.
        peak: highest memory in use on the device, bytes.
    """
    share = found.busy / found.window if found.window else 0.0
    who = "the device was at work" if found.kernels else "an operator was at work (no device of its own was seen)"
    waits = sum(entry.calls for entry in found.waits)
    lines = [
        f"# Profile of steps {found.first} to {found.last}",
        "",
        "The profiler itself takes time: shares can be trusted, milliseconds are above those of a run without it.",
        "Own time of each name, without what it calls. `trace.json` is for chrome://tracing or ui.perfetto.dev.",
        "",
        f"- {1000 * found.window / found.count:.2f} ms a step; {who} {share:.1%} of it, gaps are {1 - share:.1%}",
        *([f"- {waits / found.count:g} waits of the host for the device a step"] if found.kernels else []),
        "",
        *_table("Operators on the host", found.operators, found.count),
    ]
    if found.kernels:
        lines += _table("Kernels on the device", found.kernels, found.count)
    if found.waits and found.kernels:
        lines += _table("Waits of the host (with what they wait in)", found.waits, found.count)
    return "\n".join([*lines, *_memory(kinds, guess, peak)])
