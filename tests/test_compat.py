"""What `lit_glm.compat` uses of dependencies is there and does what it is for; nothing else uses private names."""

import inspect
import io
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_glm import compat

SRC = Path(compat.__file__).parent
OLD = torch.__version__.startswith("1.")
PRIVATE = (
    r"hydra\._internal|_signal_connector|_TrainingEpochLoop|_broadcast_sigterm|__class__ = |_save_loggers_on|"
    r"_batches_that_stepped|_run_exitfuncs|torch\._C\b|_dynamo|_linear_pointwise|np\._core|_foreach_"
)


def test_private_dependency_names_occur_only_in_compat() -> None:
    found = [path.name for path in SRC.rglob("*.py") if re.search(PRIVATE, path.read_text(encoding="utf-8"))]
    assert found == ["compat.py"]


def test_lightning_does_not_replace_signal_handlers() -> None:
    """The names are there, and `fit` calls them: else a SIGTERM in it would end a run without a checkpoint."""
    import pytorch_lightning as pl

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert callable(trainer._signal_connector.teardown)
    assert OLD or callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    compat.keep_own_signals(trainer)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        trainer._signal_connector.register_signal_handlers()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "_signal_connector.register_signal_handlers()" in inspect.getsource(pl.Trainer)


@pytest.mark.slow
def test_lightning_is_imported_without_packages_for_plots() -> None:
    """A new process, as these packages are imported here already; afterwards they are there for everybody."""
    lines = (
        "import gc, sys",
        "from importlib import metadata",
        "from lit_glm.compat import without_plotting",
        "gc.disable()  # which halves the time of the imports",
        "with without_plotting():",
        "    import lit_glm.launch.rank_runner, pytorch_lightning, torchmetrics",
        "found = [name for name in ('matplotlib', 'PIL', 'scipy') if name in sys.modules]",
        "import matplotlib.figure",
        "print(found, metadata.version('matplotlib') == matplotlib.__version__)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


PLOTS_FIRST = """
import gc, importlib, os, sys
import torch
from lit_glm.compat import without_plotting

gc.disable()
for first in ("matplotlib", "matplotlib.figure"):
    child = os.fork()  # torch has been imported once
    if child == 0:
        importlib.import_module(first)
        with without_plotting():
            import torchmetrics
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"not after: {first}")
"""


@pytest.mark.slow
def test_train_works_after_importing_matplotlib() -> None:
    """Half of matplotlib is imported already: torchmetrics, which looks for it, finds the other half."""
    done = subprocess.run([sys.executable, "-c", PLOTS_FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


DISTRIBUTED_STEP = """
import sys
import torch
from lit_glm.config.schema import TrainConfig
from lit_glm.process_utils import fast_imports

with fast_imports(TrainConfig()):
    import lit_glm.launch.rank_runner

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
torch.distributed.destroy_process_group()
print("torch._dynamo.eval_frame" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="torch 1.12 has no compiler")
def test_a_rank_on_the_cpu_imports_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", DISTRIBUTED_STEP], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


NEEDS = """
import gc, os, sys
import torch
from lit_glm.compat import postpone_compiler

def check():
    compiler = sys.modules["torch._dynamo"]
    assert compiler is torch._dynamo and type(compiler).__name__ == "module"
    assert compiler.eval_frame is sys.modules["torch._dynamo.eval_frame"]
    assert compiler.eval_frame.OptimizedModule is compiler.OptimizedModule
    assert type(compiler.eval_frame.__spec__.loader).__name__ == "SourceFileLoader"
    assert isinstance(torch.compile(torch.nn.Linear(1, 1), backend="eager"), compiler.OptimizedModule)

gc.disable()
postpone_compiler()
for need in sys.argv[1:]:
    child = os.fork()  # each imports the compiler, and torch has been imported once
    if child == 0:
        exec(need)
        check()
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"not after: {need}")
"""


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="torch 1.12 has no compiler")
def test_a_compiler_that_was_postponed_is_imported_once_when_it_is_needed() -> None:
    needs = [
        "import torch._dynamo.eval_frame",
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2",
    ]
    done = subprocess.run([sys.executable, "-c", NEEDS, *needs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_basic_sweeper_omits_excluded_jobs() -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides(["a=1,2,3", "b=4"])
    whole = [["a=1", "b=4"], ["a=2", "b=4"], ["a=3", "b=4"]]
    try:
        compat.leave_out_jobs([1], own_folders=True)
        compat.leave_out_jobs([0], own_folders=False)  # the last call counts
        assert BasicSweeper.split_arguments(overrides, None) == [whole[1:]]
        compat.leave_out_jobs([1], own_folders=True)
        left = [[*whole[0], "hydra.sweep.subdir=0"], [*whole[2], "hydra.sweep.subdir=2"]]
        assert BasicSweeper.split_arguments(overrides, 1) == [[left[0]], [left[1]]]
        compat.leave_out_jobs([0, 1, 2], own_folders=True)
        assert BasicSweeper.split_arguments(overrides, None) == []
    finally:
        compat.leave_out_jobs([], own_folders=False)
    assert BasicSweeper.split_arguments(overrides, None) == [whole]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_compat_onednn_linear_matches_torch() -> None:
    product = compat.onednn_linear()
    assert (product is None) == OLD
    if product is not None:
        x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
        ours = product(x, weight, bias, "none", [], "")
        torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-5)


def test_numpy_random_state_unpickles_only_allowed_globals() -> None:
    allowed = {(thing.__module__, thing.__name__) for thing in compat._numpy_unpickle_globals()}

    class Listing(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            found = super().find_class(module, name)
            known = (getattr(found, "__module__", module), name) in allowed or (module, name) == ("_codecs", "encode")
            assert known or found in compat._numpy_unpickle_globals(), (module, name)
            return found

    state = np.random.RandomState(0).get_state()
    again = Listing(io.BytesIO(pickle.dumps(state, protocol=2))).load()
    np.testing.assert_array_equal(again[1], state[1])


def test_functions_for_lists_of_tensors() -> None:
    some = [torch.ones(3), torch.full((2, 2), 3.0)]
    compat.multiply_all_(some, 0.5)
    compat.multiply_all_([], 2.0)
    assert [part.flatten().tolist() for part in some] == [[0.5] * 3, [1.5] * 4]
    halves = [torch.zeros(3, dtype=torch.float16), torch.zeros(2, 2, dtype=torch.float16)]
    compat.copy_all_(halves, some)
    assert [part.flatten().tolist() for part in halves] == [[0.5] * 3, [1.5] * 4]


def test_scaled_bmm_does_not_overflow() -> None:
    left, right = torch.full((1, 2, 3), 1e30), torch.full((1, 3, 2), 1e8)
    found = compat.scaled_bmm(left, right, 2.0**-40)
    expected = (left.double() @ right.double()) * 2.0**-40
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0.0)
    if OLD:  # where the product comes in the type of its factors
        assert torch.isfinite(compat.scaled_bmm(left, 1e6 * right, 2.0**-40)).all()
