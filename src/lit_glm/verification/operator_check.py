"""The operators that a step really calls, each compared as it is called with the CPU's result in float64.

Nothing is listed by hand: a dispatch mode sees every operator below autograd with its arguments. The first time that
one comes with new shapes or types its inputs are copied to the CPU, the device computes, and the copies are
computed in float64 there.
"""

import functools
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_glm.compat import dispatch_mode
from lit_glm.errors import first_line
from lit_glm.process_utils import is_oom_error
from lit_glm.verification.error_bounds import (
    RelativeError,
    largest_error,
    operator_bound,
    reduction_length,
    relative_error,
)


def reference_result(name: str, operator: Any, args: Any, kwargs: Any) -> Any:
    """Compute the float64 result of an operator; None without a reference.

    Args:
        name: name without `aten.` and the overload.
        operator: the operator.
        args: arguments on the CPU, in float64; the operator's in-place results are written to them.
        kwargs: likewise.
    """
    reference = next((compute for end, compute in _REFERENCES.items() if name.endswith(end)), None)
    if reference is not None:
        return reference(args, kwargs)
    if "scaled_dot_product" in name or name.startswith(("_efficient_attention", "_flash_attention")):
        return _attention(name, bind_arguments(operator, args, kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    return operator(*args, **kwargs)


def _fused_linear(args: Any, kwargs: Any) -> Any:
    x, weight, bias, kind, _, algorithm = args
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate=algorithm or "none") if kind == "gelu" else out


def bind_arguments(operator: Any, args: Any, kwargs: Any) -> Dict[str, Any]:
    """Map arguments to their names in the operator's schema, because their positions differ between kernels."""
    names = [argument.name for argument in operator._schema.arguments]
    return {**dict(zip(names, args)), **kwargs}


_MASKS = ("attn_mask", "attn_bias", "bias")


def _attention(name: str, bound: Dict[str, Any], rounded: bool = False) -> List[Tensor]:
    """Compute attention without dropout; its log-sum-exp and random state are not compared.

    Args:
        name: name of the operator.
        bound: arguments by name; those of vendor kernels may have other names, and are then taken by position.
        rounded: compute instead, for a backward operator, results whose magnitude its errors are relative to. Where
            the values are similar, gradients are small differences of numbers that follow from the rounded output.
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
        difference = inner - (inner * probabilities).sum(-1, keepdim=True)
        if rounded:
            difference = (grad * (probabilities @ v)).square().sum(-1, keepdim=True).sqrt()
        of_scores = probabilities * difference * scale
        results = [of_scores @ k, of_scores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ grad]
    return [result.transpose(1, 2) for result in results] if is_rows_first else results


_REFERENCES: Dict[str, Callable[[Any, Any], Any]] = {
    "log_softmax": lambda args, kwargs: torch.log_softmax(args[0], args[1]),
    "softmax": lambda args, kwargs: torch.softmax(args[0], args[1]),  # the last argument requests conversion from half
    "linear_pointwise": _fused_linear,
    "mkldnn_linear": lambda args, kwargs: F.linear(*args),
}


_RANDOM_OPS = ("rand", "bernoulli", "dropout", "normal_", "uniform", "exponential", "multinomial")
NON_COMPUTING_OPS = (
    "empty", "new_empty", "view", "reshape", "alias", "detach", "transpose", "permute", "slice", "select", "expand",
    "as_strided", "squeeze", "unsqueeze", "split", "unbind", "unfold", "diagonal", "lift", "set_", "resize",
    "_local_scalar_dense", "record_stream", "is_pinned", "_pin_memory", "profiler.", "to_mkldnn", "to_dense",
    "_to_dense", "_reshape_alias",
)  # fmt: skip
"""Name prefixes of operators that compute nothing: they allocate memory, or change its layout or view."""


@dataclass
class OperatorResult:
    """Result of an operator with one combination of shapes and dtypes."""

    name: str
    shapes: str
    status: str
    """ok, differs, missing, fails, falls back, drawn, unknown."""
    error: RelativeError = field(default_factory=lambda: RelativeError(0.0, 0.0))
    bound: float = 0.0
    message: str = ""


@functools.lru_cache(maxsize=None)
def operator_name(operator: Any) -> str:
    """Return an operator's name without the overload: `addmm`; with the namespace for others than aten."""
    parts = str(operator).split(".")  # aten.addmm.default
    return parts[1] if parts[0] == "aten" else ".".join(parts[:2])


def tensors_in(value: Any) -> List[Tensor]:
    """Collect all tensors in an operator's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for entry in value for tensor in tensors_in(entry)] if isinstance(value, (list, tuple)) else []


def map_structure(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to all leaves of nested containers."""
    if isinstance(value, dict):
        return {key: map_structure(entry, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_structure(entry, change) for entry in value)
    return change(value)


def to_host(value: Any) -> Any:
    """Copy a tensor to the CPU in strided layout; replace a device by the CPU."""
    if isinstance(value, Tensor):
        return _to_strided(value.detach()).to("cpu", copy=True)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def to_float64(value: Any) -> Any:
    """Convert floating tensors and dtypes to float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


class OperatorRecorder:
    """Recorder that checks each kind of operator call on a device once."""

    def __init__(self, device: torch.device, tf32: bool) -> None:
        """Start without results.

        Args:
            device: device to check; operators of other devices are ignored.
            tf32: whether float32 products may round their inputs.
        """
        self._device, self._tf32 = device, tf32
        self.results: Dict[Any, OperatorResult] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Check all operators that are called within the context."""
        with dispatch_mode(self._check_call):
            yield

    def _check_call(self, operator: Any, args: Any, kwargs: Any) -> Any:
        name, tensors = operator_name(operator), tensors_in([args, kwargs])
        on_device = not tensors or any(tensor.device.type == self._device.type for tensor in tensors)
        is_read = name == "copy_" and args[0].device.type == "cpu" != self._device.type  # may not have ended
        if not on_device or name == "t" or name.startswith(NON_COMPUTING_OPS) or is_read:
            return operator(*args, **kwargs)
        key = (str(operator), str([_call_signature(entry) for entry in (args, kwargs)]))
        if key in self.results and self.results[key].status not in ("missing", "fails"):
            return operator(*args, **kwargs)
        shapes = ", ".join(f"{_dtype_name(tensor)}{list(tensor.shape)}" for tensor in tensors[:4])
        if (any(word in name for word in _RANDOM_OPS) and "backward" not in name) or _draws_dropout(
            operator, args, kwargs
        ):
            self.results[key] = OperatorResult(name, shapes, "drawn")
            return operator(*args, **kwargs)
        before = map_structure((args, kwargs), to_host)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                out = operator(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if is_oom_error(error):
                raise
            text = first_line(error)
            is_missing = isinstance(error, NotImplementedError) or any(
                word in text.lower() for word in _MISSING_PATTERNS
            )
            self.results[key] = OperatorResult(name, shapes, "missing" if is_missing else "fails", message=text)
            return self._run_on_cpu(operator, args, before, error)
        result = self._compare(operator, name, shapes, before, (args, kwargs), out)
        backs = [str(entry.message) for entry in caught if "fall" in str(entry.message).lower()]
        elsewhere = [tensor for tensor in tensors_in(out) if _is_off_device(tensor, self._device)]
        if backs or (elsewhere and "to_copy" not in name and "copy_" not in name):
            message = (backs or [f"result is on {elsewhere[0].device}"])[0][:200]
            # In addition to the comparison: a result can be wrong and computed elsewhere.
            self.results[(*key, "falls back")] = OperatorResult(name, shapes, "falls back", message=message)
        self.results[key] = result
        return out

    def _run_on_cpu(self, operator: Any, args: Any, before: Any, error: Exception) -> Any:
        """Compute an operator that the device cannot run in float64 on the CPU, so that the step can continue."""
        wide_args, wide_kwargs = map_structure(before, to_float64)
        try:
            out = reference_result(operator_name(operator), operator, wide_args, wide_kwargs)
        except Exception:
            raise error from None
        if operator_name(operator).endswith("_"):
            for copied, theirs in zip(tensors_in(args), tensors_in(wide_args)):
                copied.copy_(theirs)
            return args[0]
        floating = next((tensor.dtype for tensor in tensors_in(args) if tensor.is_floating_point()), torch.float32)

        def back(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            return part.to(self._device, floating if part.is_floating_point() else part.dtype)

        return map_structure(out, back)

    def _compare(self, operator: Any, name: str, shapes: str, before: Any, after: Any, out: Any) -> OperatorResult:
        writes = name.endswith("_") or str(operator).endswith("out")
        try:
            inputs = map_structure(before, to_float64)
            exact: Any = reference_result(name, operator, *inputs)
        except Exception as error:
            return OperatorResult(
                name, shapes, "unknown", message=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            )
        if exact is None and not writes:
            return OperatorResult(name, shapes, "unknown", message="no independent CPU reference")
        actual = tensors_in(list(after)) if writes else [_to_strided(tensor) for tensor in tensors_in(out)]
        expected = tensors_in(list(inputs)) if writes else tensors_in(exact)
        actual = actual[: _COMPARED_RESULTS.get(name)]
        pairs = [(result, reference) for result, reference in zip(actual, expected) if result.numel()]
        terms = reduction_length(tensors_in(list(before)), [result for result, _ in pairs])
        errors, bound, status = [RelativeError(0.0, 0.0)], 0.0, "ok"
        rounded: List[Tensor] = []
        if "attention" in name and "backward" in name:
            rounded = _attention(name, bind_arguments(operator, *inputs), rounded=True)
        for place, (result, reference) in enumerate(pairs):
            if result.is_floating_point():
                narrowest = _narrowest_dtype([result, *tensors_in(list(before))])
                in_type = any(word in name for word in _ADDS_IN_TYPE)
                in_type |= name == "native_layer_norm_backward" and result.dim() == 1 and result.device.type == "cpu"
                own_bound = operator_bound(narrowest, terms, self._tf32, "attention" in name, in_type)
                # Near-cancellation: the error is relative to the magnitude of the inputs.
                least = _input_magnitude(tensors_in(list(inputs))) if narrowest is torch.float32 else 0.0
                if place < len(rounded):
                    least = max(least, float(rounded[place].square().mean().sqrt()))
                deviation = relative_error(result, reference.double(), least)
                bound = max(bound, own_bound)
                status = status if deviation.within(own_bound) else "differs"
            else:
                share = float((result.cpu() != reference.to(result.dtype)).double().mean())
                deviation = RelativeError(share, share)
                status = status if share <= _TIES else "differs"
            errors.append(deviation)
        return OperatorResult(name, shapes, status, largest_error(errors), bound)


def _draws_dropout(operator: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operator, such as fused attention, has a dropout probability above 0 among its arguments."""
    return any("dropout" in name and bool(value) for name, value in bind_arguments(operator, args, kwargs).items())


_ADDS_IN_TYPE = ("index_add", "scatter_add", "embedding_dense_backward", "index_put")
"""Operators that accumulate term by term in the dtype of the result; torch's CPU kernel of layer norm does so too, in
the gradients of weight and bias."""
_COMPARED_RESULTS = {"nll_loss_forward": 1}
"""Number of compared results, for operators whose further results only serve their own backward."""
_MISSING_PATTERNS = ("not implemented", "could not run", "unimplemented", "not supported", "no kernel", "unsupported")
_TIES = 1e-4
"""Share of elements in which integer or boolean results may differ: numbers that only float64 distinguishes."""


def _is_off_device(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a result is on another device; not for seeds and offsets, which kernels keep on the host."""
    is_state = not tensor.is_floating_point() and tensor.numel() <= 2
    return tensor.device.type not in (device.type, "meta") and not is_state


def _to_strided(tensor: Tensor) -> Tensor:
    """Return a tensor in strided layout; converts from oneDNN's layout, which only its own operators read."""
    return tensor.to_dense() if tensor.is_mkldnn else tensor


def _narrowest_dtype(tensors: List[Tensor]) -> torch.dtype:
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)


def _input_magnitude(tensors: List[Tensor]) -> float:
    """Return the magnitude of a product of the inputs: RMS of the first one, reduced by those of others below 1."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    sizes = [float(tensor.double().square().mean().sqrt()) for tensor in floating]
    known = [size for size in sizes if 0.0 < size < float("inf")]
    return known[0] * math.prod(min(1.0, size) for size in known[1:]) if known else 0.0


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).replace("torch.", "")


def _call_signature(value: Any) -> Any:
    """Return what identifies a kind of call: shapes and dtypes of tensors, and all other arguments."""
    plain: Callable[[Any], Any] = lambda entry: (  # noqa: E731
        (str(entry.dtype), tuple(entry.shape)) if isinstance(entry, Tensor) else repr(entry)
    )
    return map_structure(value, plain)


_READS = ("aten::_local_scalar_dense", "aten::item")
"""Operators that return a number to the host by design."""


def find_cpu_fallbacks(step: Callable[[], Any]) -> List[Tuple[str, str]]:
    """Find operators of a step that torch silently runs on the CPU, with torch's profiler."""
    with torch.autograd.profiler.profile() as profile:
        step()
    fallbacks: Dict[str, str] = {}
    for event in profile.function_events:
        if event.name == "aten::_to_cpu":
            parent = event.cpu_parent
            while parent is not None and (not parent.name.startswith("aten::") or parent.name == event.name):
                parent = parent.cpu_parent
            if parent is not None and parent.name in _READS:
                continue
            fallbacks[parent.name if parent is not None else "unknown"] = "its inputs are copied to the CPU"
    return [(name.replace("aten::", ""), text) for name, text in fallbacks.items()]
