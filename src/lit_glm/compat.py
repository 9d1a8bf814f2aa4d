"""Names that dependencies call private and this project cannot do without. They stand nowhere else.

Each has its reason; `tests/test_compat.py` fails when a release of the dependency changes one.
"""

from typing import Any, Callable, ContextManager, List, Optional, Tuple


def keep_own_signals(trainer: Any) -> None:
    """Have Lightning set no signal handlers, and broadcast none of its own between ranks.

    Its handler of SIGTERM ends a run without a checkpoint, sits there from the middle of `fit` on, and has every step
    of several ranks broadcast whether one has got the signal (Lightning 2.6). No argument of the trainer prevents it.
    """
    connector = trainer._signal_connector
    connector.register_signal_handlers = connector.teardown = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def onednn_linear() -> Optional[Callable[..., Any]]:
    """OneDNN's product of dense tensors, (x, weight, bias, "none", [], "") -> y; None before torch 2.

    torch has no public way to it but tensors of a layout of their own, which are copied twice a call.
    """
    import torch

    if not hasattr(torch, "compile"):
        return None
    found: Optional[Callable[..., Any]] = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return found


def numpy_unpickle_globals() -> Tuple[Callable[..., Any], ...]:
    """What a pickled numpy random state names: published checkpoints hold one, which torch's safe reader must allow."""
    import numpy as np

    core: Any = np._core if hasattr(np, "_core") else np.core  # numpy 2, numpy 1
    kinds = dict.fromkeys(type(np.dtype(kind)) for kind in "?bBhHiIlLfdU")
    return (core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, *kinds)


def dispatch_mode(see: Callable[[Any, Any, Any], Any]) -> ContextManager[Any]:
    """Have `see(operator, args, kwargs)` called in place of each operator below autograd; it calls the operator itself.

    torch has it in a module of a private name, with a base class that changed after 1.12; nothing public tells which
    operators a step calls with their arguments.
    """
    from torch.utils import _python_dispatch

    class Seeing(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return see(func, args, kwargs or {})

    push: Any = getattr(_python_dispatch, "push_torch_dispatch_mode", None)  # torch 1.12 makes it itself
    return Seeing() if push is None else push(Seeing)


def multiply_all_(tensors: List[Any], factor: float) -> None:
    """Multiply tensors in place: a few kernels for all of them, where one each would be 293 a step of GLM-Large.

    torch documents its functions for lists of tensors, under names with an underscore.
    """
    import torch

    if tensors:
        torch._foreach_mul_(tensors, factor)


def copy_all_(targets: List[Any], sources: List[Any]) -> None:
    """Copy tensors into others, whatever their types, as few kernels; one by one before torch 2.1."""
    import torch

    each = getattr(torch, "_foreach_copy_", None)
    if each is not None and targets:
        each(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)
