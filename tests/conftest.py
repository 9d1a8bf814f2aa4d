"""What several tests need: the golden files, a small corpus, and commands as users type them."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # tests run beside each other: none is judged by its time
settings.load_profile("unhurried")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two tests at a time: threads that spin take each other's cores
GOLDEN = Path(__file__).parent / "parity" / "golden"
HDF5 = GOLDEN / "ReCoRD" / "glm_train_eval_hdf5_sparse"
TRAIN_FILE = HDF5 / "train_hdf5" / "train_sparse.hdf5"
EVAL_FILE = HDF5 / "eval_hdf5" / "eval_sparse.hdf5"
CHECKPOINT = GOLDEN / "blocklm-large-blank"

LONGEST = ("runs", "preflight", "documents", "tuning", "verification", "hardware", "parity", "planning", "model")
"""Folders, those of real processes before all others."""


def pytest_addoption(parser: Any) -> None:
    """For `tests/hardware/conformance.py`, which anyone runs against a runtime of theirs."""
    parser.addoption("--runtime", default=None, help="package.module.Class: what tests/hardware/conformance.py checks")


def pytest_collection_modifyitems(items: List[Any]) -> None:
    """Files that take longest first: one that came last would run alone."""

    def place(item: Any) -> int:
        return next((place for place, name in enumerate(LONGEST) if name in item.path.parts), len(LONGEST))

    items.sort(key=place)


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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def command(name: str, *arguments: str) -> List[str]:
    return [sys.executable, "-m", f"lit_glm.{name}", *arguments]


def lit_glm(
    name: str, *arguments: str, cwd: Path, env: Optional[Dict[str, str]] = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, as a user does."""
    return subprocess.run(
        command(name, *arguments),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def lit_glm_here(name: str, *arguments: str) -> int:
    """Run a command in this process: the same entry, without a second import of torch."""
    import importlib

    before = list(sys.argv)
    sys.argv = [f"lit_glm.{name}", *arguments]
    try:
        status: int = importlib.import_module(f"lit_glm.{name}").main()
        return status
    finally:
        sys.argv = before


def rows(path: Path) -> List[Dict[str, Any]]:
    import csv

    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


def tree_digest(folder: Path) -> Dict[str, str]:
    """Hash of every file below a folder, by its path: what a refused command must leave as it was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
