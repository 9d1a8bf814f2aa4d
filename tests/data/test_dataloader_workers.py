import logging
import multiprocessing
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Iterator, List

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from lit_glm.data import datamodule
from lit_glm.data.datamodule import WorkerBatches, worker_init_fn


class _Numbers(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return index


def _slow_worker_init(worker: int) -> None:
    time.sleep(0.3)  # a signal finds the process before it has been told to leave signals to its rank
    worker_init_fn(worker)


@pytest.fixture
def signals() -> Iterator[List[int]]:
    """The signals that this process, the rank, has got."""
    got: List[int] = []
    before = {n: signal.signal(n, lambda number, _frame: got.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("started", [False, True])
def test_dataloader_workers_ignore_signals_to_the_process_group(number: int, started: bool, signals: List[int]) -> None:
    others = psutil.Process().children()  # of earlier tests, such as the fork server
    loader: Any = DataLoader(_Numbers(), batch_size=None, num_workers=1, worker_init_fn=_slow_worker_init)
    items = iter(WorkerBatches(lambda done, timeout_s: loader))
    seen = [next(items)] if started else []
    for process in [*(child for child in psutil.Process().children() if child not in others), psutil.Process()]:
        process.send_signal(number)
    assert [int(n) for n in seen + list(items)] == [0, 1, 2]
    assert signals == [number]


class _Hanging(_Numbers):
    """Its first worker never returns the batch `at`; that worker ignores SIGTERM as all do."""

    def __init__(self, at: int, folder: Path) -> None:
        self._at, self._was_here = at, folder / "was here"

    def __getitem__(self, index: int) -> int:
        if index == self._at and not self._was_here.exists():
            self._was_here.touch()
            time.sleep(600)
        return index


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.slow  # torch waits 5 s for a worker before it gives up on it
def test_hanging_dataloader_worker_is_replaced_without_lost_batches(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datamodule, "_SILENT_S", 1.0)
    monkeypatch.setattr(logging.getLogger("lit_glm"), "propagate", True)
    dataset, others = _Hanging(at, tmp_path), set(multiprocessing.active_children())

    def make_loader(done: int, timeout_s: float) -> Any:
        order: Any = range(done, 3)
        own = {"num_workers": 1, "worker_init_fn": worker_init_fn, "timeout": timeout_s}
        return DataLoader(dataset, sampler=order, batch_size=None, **own)

    assert [int(number) for number in WorkerBatches(make_loader)] == [0, 1, 2]
    assert "the processes that load data are replaced" in caplog.text
    assert set(multiprocessing.active_children()) == others  # nothing is left


def test_dataloader_worker_error_is_raised() -> None:
    class Wrong(_Numbers):
        def __getitem__(self, index: int) -> int:
            raise ValueError("wrong example")

    loader: Any = DataLoader(Wrong(), batch_size=None, num_workers=1, timeout=5)
    with pytest.raises(ValueError, match="wrong example") as raised:
        list(WorkerBatches(lambda done, timeout_s: loader))
    # Its frames hold the loader's iterator. Collected as part of a cycle, that one would wait 10 s for its worker.
    traceback.clear_frames(raised.tb)


@pytest.mark.slow
def test_process_exits_while_an_error_references_the_dataloader(tmp_path: Path) -> None:
    script = tmp_path / "keeps.py"
    script.write_text("""
from torch.utils.data import DataLoader, Dataset
from lit_glm.data.datamodule import WorkerBatches, worker_init_fn

class Wrong(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise ValueError("wrong example")

loader = DataLoader(Wrong(), batch_size=None, num_workers=1, worker_init_fn=worker_init_fn, timeout=5)
try:
    list(WorkerBatches(lambda done, timeout_s: loader))
except ValueError as error:
    kept = error  # its traceback refers to the loader's iterator
""")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")
