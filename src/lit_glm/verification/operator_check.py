"""The operators that a step really calls, each compared as it is called with the CPU's result in float64.

Nothing is listed by hand: a dispatch mode sees every operator below autograd with its arguments. The first time that
one comes with new shapes or types its inputs are copied to the processor, the device computes, and the copies are
computed in float64 there.
"""

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.compat import dispatch_mode
from lit_glm.process_utils import is_oom_error
from lit_glm.verification.error_bounds import (
    RelativeError,
    largest_error,
    operator_bound,
    reduction_length,
    relative_error,
)


def reference_result(name: str, operator: Any, args: Any, kwargs: Any) -> Any:
    """Results in float64; None where nothing is known to compare with.

    Args:
        name: without `aten.` and the overload.
        operator: itself.
        args: on the processor, in float64; what the operator writes to is written to here too.
        kwargs: likewise.
    """
    own = next((compute for end, compute in _OWN.items() if name.endswith(end)), None)
    if own is not None:
        return own(args, kwargs)
    if "scaled_dot_product" in name or name.startswith(("_efficient_attention", "_flash_attention")):
        return _attention(name, bind_arguments(operator, args, kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    return operator(*args, **kwargs)


def _softmax(args: Any, kwargs: Any) -> Any:
    return torch.softmax(args[0], args[1])  # the last argument asks for a conversion of halves


def _log_softmax(args: Any, kwargs: Any) -> Any:
    return torch.log_softmax(args[0], args[1])


def _linear(args: Any, kwargs: Any) -> Any:
    return F.linear(*args)


def _fused_linear(args: Any, kwargs: Any) -> Any:
    x, weight, bias, kind, _, algorithm = args
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate=algorithm or "none") if kind == "gelu" else out


def bind_arguments(operator: Any, args: Any, kwargs: Any) -> Dict[str, Any]:
    """Arguments by the names of the operator's schema: the same argument stands in another place of each kernel."""
    names = [argument.name for argument in operator._schema.arguments]
    return {**dict(zip(names, args)), **kwargs}


_MASKS = ("attn_mask", "attn_bias", "bias")


def _attention(name: str, bound: Dict[str, Any]) -> Optional[List[Tensor]]:
    """Attention whose dropout is 0; its log-sum-exp and random state are not compared.

    Args:
        name: of the operator.
        bound: its arguments by name; a kernel of a vendor's own may have other names, and is taken by its order.
    """
    values = list(bound.values())
    first = int("backward" in name)
    q, k, v = (bound.get(key, values[first + place]) for place, key in enumerate(("query", "key", "value")))
    mask = next((bound[key] for key in _MASKS if isinstance(bound.get(key), Tensor)), None)
    if mask is None and not any(key in bound for key in _MASKS) and len(values) > first + 3:
        mask = values[first + 3] if isinstance(values[first + 3], Tensor) and not first else None
    is_rows_first = name.startswith(("_efficient_attention", "_flash_attention"))  # [N, S, H, D] there
    if is_rows_first:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    scale = bound.get("scale") or q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if bound.get("is_causal"):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    probabilities = torch.softmax(scores, -1)
    if not first:
        results = [probabilities @ v]
    else:
        grad = values[0].transpose(1, 2) if is_rows_first else values[0]
        inner = grad @ v.transpose(-1, -2)
        of_scores = probabilities * (inner - (inner * probabilities).sum(-1, keepdim=True)) * scale
        results = [of_scores @ k, of_scores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ grad]
    return [result.transpose(1, 2) for result in results] if is_rows_first else results


_OWN: Dict[str, Callable[[Any, Any], Any]] = {
    "log_softmax": _log_softmax,
    "softmax": _softmax,
    "linear_pointwise": _fused_linear,
    "mkldnn_linear": _linear,
}


_DRAWN = ("rand", "bernoulli", "dropout", "normal_", "uniform", "exponential", "multinomial")
_PLAIN = (
    "empty", "new_empty", "view", "reshape", "alias", "detach", "transpose", "permute", "slice", "select", "expand",
    "as_strided", "squeeze", "unsqueeze", "split", "unbind", "unfold", "diagonal", "lift", "set_", "resize",
    "_local_scalar_dense", "record_stream", "is_pinned", "_pin_memory", "profiler.", "to_mkldnn", "to_dense",
    "_to_dense",
)  # fmt: skip
"""Beginnings of names of operators that compute nothing: they give memory, lay it out or look at it otherwise."""


@dataclass
class OperatorResult:
    """An operator with the shapes and types that it was called with."""

    name: str
    shapes: str
    status: str
    """ok, differs, missing, fails, falls back, drawn, unknown."""
    error: RelativeError = field(default_factory=lambda: RelativeError(0.0, 0.0))
    bound: float = 0.0
    message: str = ""


def operator_name(operator: Any) -> str:
    """Such as `aten.addmm`, without the overload."""
    parts = str(operator).split(".")  # aten.addmm.default
    return parts[1] if parts[0] == "aten" else ".".join(parts[:2])


def tensors_in(value: Any) -> List[Tensor]:
    """All tensors of an operator's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for entry in value for tensor in tensors_in(entry)] if isinstance(value, (list, tuple)) else []


def map_structure(value: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments with everything that is no container changed."""
    if isinstance(value, dict):
        return {key: map_structure(entry, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_structure(entry, change) for entry in value)
    return change(value)


def to_host(value: Any) -> Any:
    """A tensor's copy on the processor, in rows; a device by the processor."""
    if isinstance(value, Tensor):
        return _to_strided(value.detach()).to("cpu", copy=True)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def to_float64(value: Any) -> Any:
    """Floating tensors and types by float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


class OperatorRecorder:
    """Sees all operators of a device and judges each kind of call once."""

    def __init__(self, device: torch.device, tf32: bool) -> None:
        """Begin.

        Args:
            device: what is looked at; operators of other devices are not.
            tf32: whether products of float32 may round their inputs.
        """
        self._device, self._tf32 = device, tf32
        self.seen: Dict[Any, OperatorResult] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, everything is seen."""
        with dispatch_mode(self._see):
            yield

    def _see(self, operator: Any, args: Any, kwargs: Any) -> Any:
        name, tensors = operator_name(operator), tensors_in([args, kwargs])
        here = not tensors or any(tensor.device.type == self._device.type for tensor in tensors)
        if not here or name == "t" or name.startswith(_PLAIN):
            return operator(*args, **kwargs)
        key = (str(operator), str([_call_signature(entry) for entry in (args, kwargs)]))
        if key in self.seen and self.seen[key].status not in ("missing", "fails"):
            return operator(*args, **kwargs)
        shapes = ", ".join(f"{_dtype_name(tensor)}{list(tensor.shape)}" for tensor in tensors[:4])
        if any(word in name for word in _DRAWN) or _draws_dropout(operator, args, kwargs):
            self.seen[key] = OperatorResult(name, shapes, "drawn")
            return operator(*args, **kwargs)
        before = map_structure((args, kwargs), to_host)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                out = operator(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if is_oom_error(error):
                raise
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            is_missing = isinstance(error, NotImplementedError) or any(word in text.lower() for word in _SAYS_MISSING)
            self.seen[key] = OperatorResult(name, shapes, "missing" if is_missing else "fails", message=text)
            return self._by_the_processor(operator, args, before, error)
        found = self._judged(operator, name, shapes, before, (args, kwargs), out)
        backs = [str(entry.message) for entry in said if "fall" in str(entry.message).lower()]
        elsewhere = [tensor for tensor in tensors_in(out) if _has_left(tensor, self._device)]
        if backs or (elsewhere and "to_copy" not in name and "copy_" not in name):
            message = (backs or [f"its result is on {elsewhere[0].device}"])[0][:200]
            # Beside what it came to: a result can be wrong and computed elsewhere.
            self.seen[(*key, "falls back")] = OperatorResult(name, shapes, "falls back", message=message)
        self.seen[key] = found
        return out

    def _by_the_processor(self, operator: Any, args: Any, before: Any, error: Exception) -> Any:
        """What the device cannot do, in float64, so that the step goes on."""
        wide_args, wide_kwargs = map_structure(before, to_float64)
        try:
            out = reference_result(operator_name(operator), operator, wide_args, wide_kwargs)
        except Exception:
            raise error from None
        if operator_name(operator).endswith("_"):
            for mine, theirs in zip(tensors_in(args), tensors_in(wide_args)):
                mine.copy_(theirs)
            return args[0]
        floating = next((tensor.dtype for tensor in tensors_in(args) if tensor.is_floating_point()), torch.float32)

        def back(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            return part.to(self._device, floating if part.is_floating_point() else part.dtype)

        return map_structure(out, back)

    def _judged(self, operator: Any, name: str, shapes: str, before: Any, after: Any, out: Any) -> OperatorResult:
        writes = name.endswith("_") or str(operator).endswith("out")
        try:
            inputs = map_structure(before, to_float64)
            exact: Any = reference_result(name, operator, *inputs)
        except Exception as error:
            return OperatorResult(
                name, shapes, "unknown", message=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            )
        if exact is None and not writes:
            return OperatorResult(name, shapes, "unknown", message="the processor has it in no other way")
        mine = tensors_in(list(after)) if writes else [_to_strided(tensor) for tensor in tensors_in(out)]
        theirs = tensors_in(list(inputs)) if writes else tensors_in(exact)
        mine = mine[: _COMPARED_RESULTS.get(name)]
        pairs = [(own, other) for own, other in zip(mine, theirs) if own.numel()]
        terms = reduction_length(tensors_in(list(before)), [own for own, _ in pairs])
        far, bound, status = [RelativeError(0.0, 0.0)], 0.0, "ok"
        for own, other in pairs:
            if own.is_floating_point():
                narrowest = _narrowest_dtype([own, *tensors_in(list(before))])
                in_type = any(word in name for word in _ADDS_IN_TYPE)
                own_bound = operator_bound(narrowest, terms, self._tf32, "attention" in name, in_type)
                # What nearly cancels is as far off as what it was made of.
                least = _input_magnitude(tensors_in(list(inputs))) if narrowest is torch.float32 else 0.0
                distant = relative_error(own, other.double(), least)
                bound = max(bound, own_bound)
                status = status if distant.within(own_bound) else "differs"
            else:
                share = float((own.cpu() != other.to(own.dtype)).double().mean())
                distant = RelativeError(share, share)
                status = status if share <= _TIES else "differs"
            far.append(distant)
        return OperatorResult(name, shapes, status, largest_error(far), bound)


def _draws_dropout(operator: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator such as fused attention has a share of dropout among its arguments."""
    return any("dropout" in name and bool(value) for name, value in bind_arguments(operator, args, kwargs).items())


_ADDS_IN_TYPE = ("index_add", "scatter_add", "embedding_dense_backward", "index_put")
"""Operators that add one number after the other to what is stored, in its type."""
_COMPARED_RESULTS = {"nll_loss_forward": 1}
"""Operators whose further results are for their own backward alone: how many of them are compared."""
_SAYS_MISSING = ("not implemented", "could not run", "unimplemented", "not supported", "no kernel", "unsupported")
_TIES = 1e-4
"""Share of the comparisons that may come out otherwise: of numbers that only float64 tells apart."""


def _has_left(tensor: Tensor, device: torch.device) -> bool:
    """Whether a result is on another device than it should: not a seed or an offset, which kernels keep on the host."""
    is_state = not tensor.is_floating_point() and tensor.numel() <= 2
    return tensor.device.type not in (device.type, "meta") and not is_state


def _to_strided(tensor: Tensor) -> Tensor:
    """Itself; a tensor in oneDNN's own layout, which only its operators read, as any other."""
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def _narrowest_dtype(tensors: List[Tensor]) -> torch.dtype:
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)


def _input_magnitude(tensors: List[Tensor]) -> float:
    """Of a product of the inputs: root mean square of the first, less where another one's is below 1."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    sizes = [float(tensor.double().square().mean().sqrt()) for tensor in floating]
    known = [size for size in sizes if 0.0 < size < float("inf")]
    return known[0] * math.prod(min(1.0, size) for size in known[1:]) if known else 0.0


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).replace("torch.", "")


def _call_signature(value: Any) -> Any:
    """What tells one kind of call from another: shapes and types, and all that is no tensor."""
    plain: Callable[[Any], Any] = lambda entry: (  # noqa: E731
        (str(entry.dtype), tuple(entry.shape)) if isinstance(entry, Tensor) else repr(entry)
    )
    return map_structure(value, plain)


_READS = ("aten::_local_scalar_dense", "aten::item")
"""Operators whose result is a number of the host's by design."""


def find_cpu_fallbacks(step: Callable[[], Any]) -> List[Tuple[str, str]]:
    """Operators that torch sends to the processor and back without a word, as its profiler sees them in a step."""
    with torch.autograd.profiler.profile() as profile:
        step()
    found: Dict[str, str] = {}
    for event in profile.function_events:
        if event.name == "aten::_to_cpu":
            parent = event.cpu_parent
            while parent is not None and (not parent.name.startswith("aten::") or parent.name == event.name):
                parent = parent.cpu_parent
            if parent is not None and parent.name in _READS:
                continue
            found[parent.name if parent is not None else "unknown"] = "its inputs are copied to the processor"
    return [(name.replace("aten::", ""), said) for name, said in found.items()]
