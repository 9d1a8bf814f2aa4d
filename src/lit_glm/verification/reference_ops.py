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
        return _attention(name, args, kwargs)
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


def _attention(name: str, args: Any, kwargs: Any) -> Optional[List[Tensor]]:
    """Attention whose dropout is 0; its log-sum-exp and random state are not compared."""
    backward = "backward" in name
    q, k, v = args[1:4] if backward else args[:3]
    mask = kwargs.get("attn_mask")
    if "efficient" in name:
        mask = args[4] if backward else args[3]
    scale = kwargs.get("scale") or q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale
    probabilities = torch.softmax(scores if mask is None else scores + mask, -1)
    if not backward:
        return [probabilities @ v]
    grad = args[0]
    inner = grad @ v.transpose(-1, -2)
    of_scores = probabilities * (inner - (inner * probabilities).sum(-1, keepdim=True)) * scale
    return [of_scores @ k, of_scores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ grad]


_OWN: Dict[str, Callable[[Any, Any], Any]] = {
    "log_softmax": _log_softmax,
    "softmax": _softmax,
    "linear_pointwise": _fused_linear,
    "mkldnn_linear": _linear,
}
