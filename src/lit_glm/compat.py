"""What differs between the versions of dependencies, and the private APIs that this project needs; used nowhere else.

Each function gives the reason; `tests/test_compat.py` fails if a release of the dependency changes one.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import pickle
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, ContextManager, Iterator, List, Optional, Sequence


def keep_own_signals(trainer: Any) -> None:
    """Prevent Lightning from installing signal handlers and from broadcasting signals between ranks.

    Its SIGTERM handler is installed in the middle of `fit`, ends a run without a checkpoint, and makes the ranks
    broadcast at every step whether one has received the signal (Lightning 2.6). No trainer argument prevents it.
    """
    connector = trainer._signal_connector
    connector.register_signal_handlers = connector.teardown = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


class _HidingFinder:
    """Import hook for which the packages that draw and filter are not installed."""

    hidden = ("matplotlib", "mpl_toolkits", "PIL", "scipy")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

    def find_distributions(self, context: Any) -> Iterator[Any]:
        if context.name in self.hidden:
            raise metadata.PackageNotFoundError(context.name)
        return iter(())


@contextlib.contextmanager
def without_plotting() -> Iterator[None]:
    """Hide packages for plots from Lightning and torchmetrics while they are imported inside the block.

    torchmetrics imports matplotlib, Pillow and scipy wherever they are installed, for plots and audio metrics that
    nothing here uses: up to a third of the time in which a rank starts (benchmarks/startup.py). It has no option for
    that. Afterwards all code can import these packages; only `Metric.plot` of torchmetrics reports them as missing.
    Nothing is hidden from a program that has imported one of them: torchmetrics would then find half of it.
    """
    # Older versions of matplotlib put the empty package mpl_toolkits there at the start of every process (a .pth file).
    if any(name in sys.modules for name in _HidingFinder.hidden if name != "mpl_toolkits"):
        yield
        return
    finder: Any = _HidingFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


_COMPILER = "torch._dynamo"


class _CompilerStandIn(ModuleType):
    """Module of torch's compiler that is imported when something needs more of it than the given attributes."""

    __path__: List[str] = []

    def __init__(self, name: str, **attributes: Any) -> None:
        super().__init__(name)
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        _import_compiler()
        return getattr(importlib.import_module(self.__name__), name)


def _import_compiler() -> None:
    """Import torch's compiler, which takes the place of its stand-in."""
    import torch

    if isinstance(sys.modules[_COMPILER], _CompilerStandIn):
        del sys.modules[_COMPILER], torch._dynamo
        importlib.import_module(_COMPILER)


class _CompilerFinder:
    """Import hook for submodules of `torch._dynamo`: replaces the stand-in by the package, which imports them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith(f"{_COMPILER}.") or not isinstance(sys.modules.get(_COMPILER), _CompilerStandIn):
            return None
        _import_compiler()
        module = sys.modules.get(name)
        if module is None:
            return importlib.util.find_spec(name)
        # With its own specification Python would execute the module a second time.
        module.__spec__ = importlib.util.spec_from_loader(name, self, origin=module.__spec__)  # type: ignore[arg-type]
        return module.__spec__

    def create_module(self, spec: Any) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: Any) -> None:
        module.__spec__ = module.__spec__.origin


def _disable(function: Any = None, *_: Any, **__: Any) -> Any:
    return (lambda decorated: decorated) if function is None else function


def postpone_compiler() -> None:
    """Import torch, and its compiler only when something needs it; nothing to do before torch 2.

    Lightning, the first step of an optimizer and DistributedDataParallel import `torch._dynamo`: a third of the time in
    which a rank starts (benchmarks/startup.py). What they use of it has no effect where nothing is compiled, and the
    stand-in has it. Anything else, also of a later release, imports the compiler.
    """
    import torch

    if not hasattr(torch, "compile") or _COMPILER in sys.modules:
        return
    utils = _CompilerStandIn(f"{_COMPILER}.utils", get_optimize_ddp_mode=lambda: "no_optimization")
    rules = _CompilerStandIn(
        f"{_COMPILER}.trace_rules",
        clear_lru_cache=lambda: None,
        LEGACY_MOD_INLINELIST=set(),
        get_legacy_mod_inlinelist=functools.lru_cache(lambda: set()),
    )
    stand_in: Any = _CompilerStandIn(
        _COMPILER,
        OptimizedModule=type("OptimizedModule", (), {}),
        disable=_disable,
        graph_break=lambda *_, **__: None,
        utils=utils,
        trace_rules=rules,
    )
    stand_in.__spec__ = importlib.util.find_spec(_COMPILER)
    sys.modules[_COMPILER] = torch._dynamo = stand_in
    finder: Any = _CompilerFinder()
    sys.meta_path.insert(0, finder)


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


def config_loader(*folders: Any) -> Any:
    """Return Hydra's loader for folders of configuration files; None is left out.

    A `glob` on the command line needs one, and Hydra makes one for its own parser only.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers what reads files
    path = ConfigSearchPathImpl()
    for folder in filter(None, folders):
        path.append("lit_glm", f"file://{Path(folder).absolute()}")
    return ConfigLoaderImpl(path)


def onednn_linear() -> Optional[Callable[..., Any]]:
    """Return oneDNN's linear for dense tensors, (x, weight, bias, "none", [], "") -> y; None before torch 2.

    Through torch's public API it is only available for tensors in oneDNN's layout, which are copied twice per call.
    """
    import torch

    if not hasattr(torch, "compile"):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def has_fused_attention() -> bool:
    """Return whether torch has `scaled_dot_product_attention` (2.0 and later)."""
    import torch

    return hasattr(torch.nn.functional, "scaled_dot_product_attention")


def has_fused_adamw() -> bool:
    """Return whether torch has a fused AdamW (2.0 and later)."""
    import torch

    return "fused" in inspect.signature(torch.optim.AdamW).parameters


def has_compile() -> bool:
    """Return whether torch has a `torch.compile` that makes one graph for all layers (2.5 and later)."""
    import torch

    return hasattr(torch, "compile") and tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 5)


def keep_graphs_whole() -> None:
    """Make torch.compile not split graphs by DDP's buckets: ours are parts of a layer, with nothing to overlap."""
    from torch import _dynamo

    _dynamo.config.optimize_ddp = False


def half_softmax(scores: Any) -> Any:
    """Return the softmax over the last dimension in the dtype of the scores; halves are summed in fp32.

    torch 1.12 has none for halves on CPU. Without the dtype, autocast on some devices would return and keep fp32.
    """
    import torch

    if scores.dtype is torch.float16 and scores.device.type == "cpu":
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    return torch.softmax(scores, dim=-1, dtype=scores.dtype)


def autocast_dtype(device_type: str) -> Optional[Any]:
    """Return the dtype of autocast on a kind of device; None where it is disabled or unknown to torch."""
    import torch

    if not hasattr(torch, "get_autocast_dtype"):  # before torch 2.4
        return torch.get_autocast_cpu_dtype() if device_type == "cpu" and torch.is_autocast_cpu_enabled() else None
    try:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    except RuntimeError:
        return None


def storage_of(tensor: Any) -> Any:
    """Return the storage of a tensor; torch 1.12 has no `untyped_storage`."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()


def meta_device() -> ContextManager[Any]:
    """Return a context in which modules are created without memory for their values; with it before torch 2.0."""
    import torch

    return contextlib.nullcontext() if torch.__version__.startswith("1.") else torch.device("meta")


def registered_backends() -> List[str]:
    """Return the collective backends that torch has, in lower case: its own, and those that packages registered."""
    import torch

    names = [name for name in vars(torch.distributed.Backend).values() if isinstance(name, str)]
    return [str(name).lower() for name in (*names, *getattr(torch.distributed.Backend, "_plugins", {}))]


def load_torch_file(path: Path, mmap: bool = False) -> Any:
    """Load a torch file onto the CPU without executing code from it; numpy's random states are allowed.

    Args:
        path: path of the file.
        mmap: read values on access, where torch supports that (2.1 and later).

    Raises:
        pickle.UnpicklingError: if the file references anything that a checkpoint does not need.
    """
    import torch

    if torch.__version__.startswith("1."):
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", pickle_module=_RestrictedPickle)
    arguments: Any = {"mmap": True} if mmap and not torch.__version__.startswith("2.0") else {}
    allow = getattr(torch.serialization, "safe_globals", None)
    with contextlib.nullcontext() if allow is None else allow(_numpy_unpickle_globals()):
        return torch.load(str(path), map_location="cpu", weights_only=True, **arguments)


def _numpy_unpickle_globals() -> List[Callable[..., Any]]:
    """Return the globals of a pickled numpy random state, as in published checkpoints, for torch's safe loader."""
    import numpy as np

    core: Any = np._core if hasattr(np, "_core") else np.core  # numpy 2, numpy 1
    kinds = dict.fromkeys(type(np.dtype(kind)) for kind in "?bBhHiIlLfdU")
    return [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, *kinds]


class _RestrictedPickle:
    """Replacement for the pickle module that `torch.load` accepts: torch 1.12 has no safe loader of its own."""

    UnpicklingError = pickle.UnpicklingError

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            kinds = "Float|Half|BFloat16|Double|Long|Int|Short|Char|Byte|Bool|Untyped"
            allowed = (
                r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(Size|device)|"
                rf"torch\.({kinds})Storage|torch\.serialization\._get_layout|torch\.storage\._?(Typed|Untyped)Storage|"
                r"torch\.(float|bfloat|int|uint|complex)\d+|torch\.bool|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+|"
                r"numpy\._?core\.multiarray\.(_reconstruct|scalar)|_codecs\.encode|builtins\.(set|frozenset|complex)"
            )
            if not re.fullmatch(allowed, f"{module}.{name}"):
                raise pickle.UnpicklingError(f"global {module}.{name} is not allowed")
            return getattr(importlib.import_module(module.replace("numpy._core", "numpy.core")), name)

    @classmethod
    def load(cls, file: Any, **_: Any) -> Any:
        return cls.Unpickler(file).load()


def dispatch_mode(handler: Callable[[Any, Any, Any], Any]) -> ContextManager[Any]:
    """Return a context that calls `see(operator, args, kwargs)`, which runs it, for each operator below autograd.

    The base class is in a private module of torch and has changed after 1.12; no public API reports the operators of a
    step with their arguments.
    """
    from torch.utils import _python_dispatch

    class CallbackMode(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handler(func, args, kwargs or {})

    push: Any = getattr(_python_dispatch, "push_torch_dispatch_mode", None)  # torch 1.12 creates the instance itself
    return CallbackMode() if push is None else push(CallbackMode)


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

    foreach_copy_ = getattr(torch, "_foreach_copy_", None)
    if foreach_copy_ is not None and targets:
        foreach_copy_(targets, sources)
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
        return torch.bmm(left, right * factor)  # the smaller one; before the product, which may overflow in fp16
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(left.new_empty(shape), left, right, beta=0.0, alpha=factor)
