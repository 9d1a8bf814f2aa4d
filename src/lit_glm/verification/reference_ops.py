"""What an operator should come to, computed by the processor in float64.

Most operators are there in float64 themselves. Fused ones of one device are not: they are written out here.
"""

from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor


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
