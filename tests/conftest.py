"""What several tests need: golden files, commands as users type them, markers by folder, context of a failure."""

import csv
import functools
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import pytest
from hypothesis import settings

from fork_server import ForkedProcess, ForkServer, can_fork, fork_only_ranks
from lit_glm.compat import without_plotting
from lit_glm.console import install_message_handler
from lit_glm.process_utils import paused_gc

settings.register_profile("unhurried", deadline=None)  # tests run beside each other: none is judged by its time
settings.load_profile("unhurried")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two tests at a time: threads that spin take each other's cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a script starts in the background
TESTS = Path(__file__).parent
GOLDEN = TESTS / "parity" / "golden"
HDF5 = GOLDEN / "ReCoRD" / "glm_train_eval_hdf5_sparse"
TRAIN_FILE = HDF5 / "train_hdf5" / "train_sparse.hdf5"
EVAL_FILE = HDF5 / "eval_hdf5" / "eval_sparse.hdf5"
CHECKPOINT = GOLDEN / "blocklm-large-blank"

MARKERS = {
    "documents": "slow",
    "hardware/test_precision.py": "process",
    "hardware/test_xpytorch.py": "process",
    "parity/test_training.py": "process",
    "reporting/test_devices.py": "process",
    "runs": "process",
    "runs_folder/test_folder.py": "process",
    "runs_folder/test_foreign_surroundings.py": "process",
    "runs_folder/test_lost_files.py": "process",
    "test_doctor.py": "process",
    "verification/test_faults.py": "process",
    "verification/test_verify.py": "process",
}
"""Folder or file -> marker of its tests; all others are `unit`. A test may have a marker of its own."""
_LONG_S = 5.0
"""A test above this without a marker that explains it is named at the end."""
_TAIL = 4000
"""Characters of a process's output that a failure shows."""


def pytest_addoption(parser: Any) -> None:
    """For `tests/hardware/conformance.py`, which anyone runs against a runtime of theirs."""
    parser.addoption("--runtime", default=None, help="package.module.Class: what tests/hardware/conformance.py checks")


def pytest_configure(config: Any) -> None:
    """Share cores and imports among the workers of pytest-xdist; print one line per promise of somebody's runtime."""
    has_workers = bool(getattr(config.option, "numprocesses", None))
    os.environ.setdefault("OMP_NUM_THREADS", "1" if has_workers else "2")  # which workers inherit
    if has_workers:
        _server.share()
    else:
        with paused_gc(), without_plotting():  # the collection would also import what torchmetrics plots with
            importlib.import_module("lit_glm.launch.rank_runner")
    if config.getoption("--runtime") is not None:
        config.option.verbose = max(1, config.option.verbose)


def pytest_collection_modifyitems(items: List[Any]) -> None:
    """Mark tests by their folder; those of processes come first, since one that came last would run alone."""
    for item in items:
        path = item.path.relative_to(TESTS)
        own = {mark.name for mark in item.iter_markers()} & {"process", "slow", "unit"}
        if not own:
            item.add_marker(MARKERS.get(path.as_posix(), MARKERS.get(path.parts[0], "unit")))
    items.sort(key=lambda item: "unit" in item.keywords)


# -- what a failure shows ----------------------------------------------------------------------------------------------

_started: List[Any] = []
"""Processes of the test that runs: (arguments, folder, what is known of the end)."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    """Add the end of each process's output and its results to a failed test, so that a log explains it."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        for arguments, cwd, done in _started:
            status, out, err = done() if callable(done) else done
            lines = [f"$ {' '.join(map(str, arguments))}", f"exit status: {status}", out[-_TAIL:], err[-_TAIL:]]
            for file in sorted(Path(cwd).rglob("result.json"))[:4]:
                lines += [str(file), file.read_text(errors="replace")[:_TAIL]]
            report.sections.append(("process", "\n".join(filter(None, lines))))
    if call.when == "teardown":
        _started.clear()


def pytest_runtest_logreport(report: Any) -> None:
    """Note unit tests that take long."""
    if report.when == "call" and report.duration > _LONG_S and "unit" in report.keywords:
        _long_tests.append(f"{report.nodeid}: {report.duration:.1f} s")


_long_tests: List[str] = []


def pytest_unconfigure() -> None:
    """End the fork server."""
    _server.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name unit tests that should be marked, or made faster."""
    for line in _long_tests:
        terminalreporter.write_line(f"warning: unit test above {_LONG_S:g} s: {line}", yellow=True)


# -- commands ---------------------------------------------------------------------------------------------------------

SHAPE = [
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.vocab_size=160",
    "model.max_sequence_length=96",
    "data.max_seq_length=96",
    "model.hidden_dropout=0",
    "model.attention_dropout=0",
]
GOLDEN_RUN = [
    *SHAPE,
    f"data.train_file={TRAIN_FILE}",
    f"data.eval_file={EVAL_FILE}",
    f"model.init_checkpoint={CHECKPOINT}",
    "bs=4",
    "eval_bs=5",
    "lr=1e-3",
    "optimizer.lr_decay_iters=22",
    "run.max_steps=25",
]
Process = Union["subprocess.Popen[str]", ForkedProcess]
_server = ForkServer()


@pytest.fixture(scope="session", autouse=True)
def _session_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    install_message_handler()  # for tests that call what a command calls
    _server.env = dict(os.environ)
    fork_only_ranks(_server)


@pytest.fixture(scope="session", autouse=True)
def _generated_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Folder of the session that `data/` of each test's working directory leads to: every corpus is generated once."""
    _shared_data.append(tmp_path_factory.mktemp("generated"))


_shared_data: List[Path] = []


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Restore the environment after each test: later runs would keep the variables of a hardware file as the user's."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def share_generated_data(name: str, arguments: Tuple[str, ...], cwd: Path) -> None:
    """Let a debug run take the generated corpus of the session; tests of the generation itself use no debug run."""
    is_debug_run = name in ("train", "tune") and "experiment=debug" in arguments
    if is_debug_run and cwd != TESTS.parent and not (cwd / "data").exists() and _shared_data:
        (cwd / "data").symlink_to(_shared_data[-1])


def command(name: str, *arguments: str) -> List[str]:
    return [sys.executable, "-m", f"lit_glm.{name}", *arguments]


def start_command(
    name: str, *arguments: str, cwd: Path, env: Optional[Dict[str, str]] = None, cold: bool = False
) -> Process:
    """Start a command in a session of its own.

    Args:
        name: of the command.
        arguments: of its command line.
        cwd: folder that it starts in.
        env: variables beside this process's.
        cold: in a new interpreter, as a user does, rather than in a fork of one that has imported torch.
    """
    whole = {**os.environ, **(env or {})}
    share_generated_data(name, arguments, cwd)
    process: Process
    if cold or not can_fork(env):
        process = subprocess.Popen(
            command(name, *arguments),
            cwd=cwd,
            env=whole,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    else:
        process = ForkedProcess(_server, f"lit_glm.{name}", list(arguments), cwd, whole)
    _started.append((process.args, cwd, lambda: (process.poll(), "", "")))
    return process


def lit_glm(
    name: str,
    *arguments: str,
    cwd: Path,
    env: Optional[Dict[str, str]] = None,
    timeout: float = 300,
    cold: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own to its end; arguments as for `start_command`."""
    process = start_command(name, *arguments, cwd=cwd, env=env, cold=cold)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    _started[-1] = (process.args, cwd, (process.returncode, out, err))
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def lit_glm_here(name: str, *arguments: str) -> int:
    """Run a command in this process: the same entry, without a second import of torch."""
    before = list(sys.argv)
    share_generated_data(name, arguments, Path.cwd())
    sys.argv = [f"lit_glm.{name}", *arguments]
    try:
        status: int = importlib.import_module(f"lit_glm.{name}").main()
        return status
    finally:
        sys.argv = before


FINISHED_STEPS = 60
FINISHED = [
    "experiment=debug",
    f"run.max_steps={FINISHED_STEPS}",
    "run.max_samples=100000",
    "run.eval_interval_samples=40",
    "run.checkpoint_interval_steps=7",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "data.num_workers=1",
]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Tuple[Path, Any]]":
    """Topology -> folder of a run of FINISHED and its process: one per session, for tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")

    @functools.lru_cache(maxsize=None)
    def run(topology: str) -> Tuple[Path, Any]:
        line = [*FINISHED, f"topology={topology}", f"hydra.run.dir={folder / topology}"]
        done = lit_glm("train", *line, cwd=folder)
        assert done.returncode == 0, done.stderr
        return folder / topology, done

    return run


def rows(path: Path) -> List[Dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tree_digest(folder: Path) -> Dict[str, str]:
    """Hash of every file below a folder, by its path: what a refused command must leave as it was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def two_hosts() -> Any:
    """Two network namespaces with a cable between them: each sees its own loopback and the other's address."""
    names = [f"litglm{os.getpid()}a", f"litglm{os.getpid()}b"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{n + 1}/24 dev v{n}" for n, name in enumerate(names)),
        *(f"ip -n {name} link set {device} up" for n, name in enumerate(names) for device in ("lo", f"v{n}")),
    ]
    try:
        if shutil.which("ip") is None:
            pytest.skip("no program ip here: two hosts cannot be imitated")
        for line in commands:
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"the kernel forbids network namespaces here: {line}: {done.stderr.strip()}")
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
