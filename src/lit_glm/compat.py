"""Private APIs of dependencies that this project needs, used nowhere else; and detours around faults of old versions.

Each function gives the reason; `tests/test_compat.py` fails if a release of the dependency changes one.
"""

import functools
from typing import Any, Callable, ContextManager, List, Optional, Sequence, Tuple


def keep_own_signals(trainer: Any) -> None:
    """Prevent Lightning from installing signal handlers and from broadcasting signals between ranks.

    Its SIGTERM handler is installed in the middle of `fit`, ends a run without a checkpoint, and makes the ranks
    broadcast at every step whether one has received the signal (Lightning 2.6). No trainer argument prevents it.
    """
    connector = trainer._signal_connector
    connector.register_signal_handlers = connector.teardown = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def leave_out_jobs(numbers: Sequence[int], own_folders: bool) -> None:
    """Make Hydra's sweeper over lists start no job for some combinations, which are complete.

    Hydra accepts only sweepers from the package `hydra_plugins`, and sweeps are products of lists, so that no list of
    overrides describes the combinations that are left.

    Args:
        numbers: numbers of the combinations, in the order of the sweep.
        own_folders: whether the folder of a job is named by the number of its combination, not by that of the job.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    split: Any = getattr(BasicSweeper.split_arguments, "__wrapped__", BasicSweeper.split_arguments)

    @functools.wraps(split)
    def split_rest(overrides: Any, max_batch_size: Optional[int]) -> List[List[List[str]]]:
        jobs = [
            [*job, *([f"hydra.sweep.subdir={number}"] if own_folders else [])]
            for number, job in enumerate(split(overrides, None)[0])
            if number not in numbers
        ]
        return list(map(list, BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size))) if jobs else []

    BasicSweeper.split_arguments = staticmethod(split_rest)  # type: ignore[method-assign]


def onednn_linear() -> Optional[Callable[..., Any]]:
    """Return oneDNN's linear for dense tensors, (x, weight, bias, "none", [], "") -> y; None before torch 2.

    Through torch's public API it is only available for tensors in oneDNN's layout, which are copied twice per call.
    """
    import torch

    if not hasattr(torch, "compile"):
        return None
    found: Optional[Callable[..., Any]] = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return found


def numpy_unpickle_globals() -> Tuple[Callable[..., Any], ...]:
    """Return the globals of a pickled numpy random state, as in published checkpoints, for torch's safe loader."""
    import numpy as np

    core: Any = np._core if hasattr(np, "_core") else np.core  # numpy 2, numpy 1
    kinds = dict.fromkeys(type(np.dtype(kind)) for kind in "?bBhHiIlLfdU")
    return (core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, *kinds)


def dispatch_mode(see: Callable[[Any, Any, Any], Any]) -> ContextManager[Any]:
    """Return a context that calls `see(operator, args, kwargs)`, which runs it, for each operator below autograd.

    The base class is in a private module of torch and has changed after 1.12; no public API reports the operators of a
    step with their arguments.
    """
    from torch.utils import _python_dispatch

    class Seeing(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return see(func, args, kwargs or {})

    push: Any = getattr(_python_dispatch, "push_torch_dispatch_mode", None)  # torch 1.12 creates the instance itself
    return Seeing() if push is None else push(Seeing)


def multiply_all_(tensors: List[Any], factor: float) -> None:
    """Multiply tensors in place with a few kernels; one per tensor would be 293 per step of GLM-Large.

    torch documents its functions for lists of tensors, but their names begin with an underscore.
    """
    import torch

    if tensors:
        torch._foreach_mul_(tensors, factor)


def copy_all_(targets: List[Any], sources: List[Any]) -> None:
    """Copy tensors into others of any dtype with few kernels; one by one before torch 2.1."""
    import torch

    each = getattr(torch, "_foreach_copy_", None)
    if each is not None and targets:
        each(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)


def scaled_bmm(left: Any, right: Any, factor: float) -> Any:
    """Return `factor` x left @ right, [N, rows, columns], by one kernel; by two before torch 2.1.

    torch 1.12.1 multiplies the uninitialised memory of `baddbmm`'s result by beta = 0, and NaN x 0 is NaN; torch 2.13
    does not. Versions between them count as old before 2.1.
    """
    import torch

    if factor == 1.0:
        return torch.bmm(left, right)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 1):
        return torch.bmm(left, right).mul_(factor)
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(left.new_empty(shape), left, right, beta=0.0, alpha=factor)
