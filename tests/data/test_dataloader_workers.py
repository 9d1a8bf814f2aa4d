import signal
import time
from typing import Any, Iterator, List

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from lit_glm.data.datamodule import SignalSafeDataLoader, worker_init_fn


class _Numbers(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return index


def _slowly(worker: int) -> None:
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
def test_a_signal_to_the_group_leaves_the_loader_to_its_rank(number: int, started: bool, signals: List[int]) -> None:
    others = psutil.Process().children()  # of earlier tests, such as the fork server
    loader: Any = DataLoader(_Numbers(), batch_size=None, num_workers=1, worker_init_fn=_slowly)
    items = iter(SignalSafeDataLoader(loader))
    seen = [next(items)] if started else []
    for process in [*(child for child in psutil.Process().children() if child not in others), psutil.Process()]:
        process.send_signal(number)
    assert [int(n) for n in seen + list(items)] == [0, 1, 2]
    assert signals == [number]
