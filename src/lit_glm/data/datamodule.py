"""Batches of the chosen scoring mode for training and evaluation, as a LightningDataModule."""

import atexit
import logging
import multiprocessing
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Callable, Iterable, Iterator, List, Set, Tuple, Union

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import PackedBatch, PaddedBatch, collate_packed, collate_padded, pad_packed
from lit_glm.data.memmap_dataset import MemmapDataset
from lit_glm.data.sampler import InfiniteDistributedBatchSampler, build_train_sampler
from lit_glm.process_utils import set_parent_death_signal

log = logging.getLogger(__name__)

_END = object()


class PrefetchIterator:
    """Iterable that prefetches up to `depth` items in a background thread."""

    def __init__(self, source: Iterable[Any], depth: int = 2) -> None:
        """Wrap `source`; each iteration restarts it."""
        self._source, self._depth = source, depth

    def __iter__(self) -> Iterator[Any]:
        items = iter(self._source)
        # Leaving the block joins the thread, as the interpreter's exit does: inside torch it would crash the process.
        with ThreadPoolExecutor(1, thread_name_prefix="batches ahead") as pool:
            ahead = deque(pool.submit(next, items, _END) for _ in range(self._depth + 1))
            try:
                item = ahead.popleft().result()
                while item is not _END:
                    ahead.append(pool.submit(next, items, _END))
                    yield item
                    item = ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()


_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}

_SILENT_S = 60.0
"""Seconds without a batch after which worker processes are replaced; twice as many each further time."""


class WorkerBatches:
    """Batches from worker processes, which ignore stop signals: their rank decides how to react to them.

    A worker is a fork of a process with threads. Rarely, on a busy machine, one hung and delivered no batch; the cause
    is unknown. Workers that deliver nothing for a while are replaced, and no batch is lost. If that does not help, as
    with storage that does not respond, the run ends by `run.stall_timeout_s`.
    """

    def __init__(self, make_loader: Callable[[int, float], "DataLoader[Any]"]) -> None:
        """Set the source.

        Args:
            make_loader: (number of batches that are done, timeout in seconds) -> loader of the others, with workers.
        """
        self._make_loader = make_loader

    def __iter__(self) -> Iterator[Any]:
        return self._replace_silent_workers(*self._start(0, _SILENT_S))

    def _replace_silent_workers(self, batches: Iterator[Any], workers: Set[Any]) -> Iterator[Any]:
        done, timeout_s = 0, _SILENT_S
        while True:
            try:
                for batch in batches:
                    done, timeout_s = done + 1, _SILENT_S
                    yield batch
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            log.warning(f"no batch for {timeout_s:g} s: the processes that load data are replaced")
            # Closes the old iterator, which would make torch raise an error when one of its workers is killed.
            batches = iter(())
            for worker in workers:
                worker.kill()  # it ignores the SIGTERM of torch
                worker.join()
            timeout_s *= 2
            batches, workers = self._start(done, timeout_s)

    def _start(self, done: int, timeout_s: float) -> Tuple[Iterator[Any], Set[Any]]:
        # Until `worker_init_fn` has run, torch's own handler ends a new worker on a signal. Workers inherit the blocked
        # mask, so that no signal arrives in between. This rank's signals are only delayed.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        other_processes = set(multiprocessing.active_children())
        try:
            batches = iter(self._make_loader(done, timeout_s))
            return batches, set(multiprocessing.active_children()) - other_processes
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _kill_workers_at_exit() -> None:
    """Kill workers of a loader that an error has left open: Python sends them SIGTERM and waits, and they ignore it."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error where a worker is killed
    for worker in workers:
        worker.kill()


def worker_init_fn(_worker: int) -> None:
    """Ignore stop signals in a worker, and end it with its rank.

    Ctrl-C and torchrun signal the whole process group, but the rank decides when to stop. Without its killed rank, a
    worker could wait for a lock of that rank forever, and keep its output and the lock of its run folder.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    set_parent_death_signal()


Collate = Callable[[MemmapDataset, List[int]], Union[PackedBatch, PaddedBatch]]


def collate_for(config: TrainConfig) -> Collate:
    """Return the collate function of the chosen scoring mode."""
    if config.scoring.name == "published":
        return partial(collate_padded, num_tokens=config.data.max_seq_length)
    if config.data.pad_to is not None:
        return partial(_collate_to_recurring_sizes, pad_to=config.data.pad_to)
    return collate_packed


def _collate_to_recurring_sizes(split: MemmapDataset, indices: List[int], pad_to: int) -> PackedBatch:
    return pad_packed(collate_packed(split, indices), pad_to)


def evaluation_batches(
    split: MemmapDataset, config: TrainConfig, rank: int = 0, world_size: int = 1, pin_memory: bool = False
) -> Iterable[Any]:
    """Return this rank's batches of the evaluation set in file order; every example belongs to exactly one rank."""
    indices = list(range(rank, len(split), world_size))
    if config.scoring.name == "published" or config.data.pad_to is not None:
        batches = [indices[start : start + config.eval_bs] for start in range(0, len(indices), config.eval_bs)]
    else:
        batches = batch_by_token_budget(indices, split.example_rows, config.eval_bs * config.data.max_seq_length)
    return _load(lambda done: batches[done:], split, config, pin_memory)


def batch_by_token_budget(examples: List[int], rows: Any, max_rows: int) -> List[List[int]]:
    """Split a list of examples, in order, into batches of at most `max_rows` rows; a longer example gets its own batch.

    Args:
        examples: indices of the examples.
        rows: number of rows of every example of the dataset.
        max_rows: maximum number of rows per batch: that of `eval_bs` sequences of full length.
    """
    batches: List[List[int]] = []
    room = 0
    for example in examples:
        need = int(rows[example])
        if not batches or need > room:
            batches.append([])
            room = max_rows
        batches[-1].append(example)
        room -= need
    return batches


def _load(
    batches_after: Callable[[int], Any], split: MemmapDataset, config: TrainConfig, pin_memory: bool
) -> Iterable[Any]:
    """Load batches ahead: in worker processes (data.num_workers), else in a thread.

    Args:
        batches_after: number of batches that are done -> the examples of each further batch.
        split: the examples.
        config: scoring and number of workers.
        pin_memory: whether copies to the device go through page-locked memory.
    """
    workers = config.data.num_workers

    def make_loader(done: int, timeout_s: float = 0) -> "DataLoader[Any]":
        return DataLoader(
            range(len(split)),  # type: ignore[arg-type]  # the collate function reads the examples of a batch together
            batch_sampler=batches_after(done),
            collate_fn=partial(collate_for(config), split),
            num_workers=workers,
            # Python 3.14 would start workers from a server process; as its children they do not end with their rank.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=worker_init_fn,
            pin_memory=pin_memory,
            timeout=timeout_s,
        )

    return WorkerBatches(make_loader) if workers else PrefetchIterator(make_loader(0))


class _TimedIterator:
    """Iterable that reports how long the consumer waited for each item."""

    def __init__(self, source: Iterable[Any], add_wait: Callable[[float], None]) -> None:
        self._source, self._add_wait = source, add_wait

    def __iter__(self) -> Iterator[Any]:
        start = time.perf_counter()
        for item in self._source:
            self._add_wait(time.perf_counter() - start)
            yield item
            start = time.perf_counter()


class RecordDataModule(pl.LightningDataModule):
    """LightningDataModule with the training batches of this rank, from any step on."""

    def __init__(
        self,
        config: TrainConfig,
        split: MemmapDataset,
        steps_done: Callable[[], int],
        pin_memory: bool,
        synchronize: Callable[[], None],
    ) -> None:
        """Configure the batches.

        Args:
            config: batch size, topology, order.
            split: the training examples.
            steps_done: called when the loader is built, after a checkpoint has been restored.
            pin_memory: whether copies to the device go through page-locked memory.
            synchronize: waits for the device.
        """
        super().__init__()
        self._config, self.split = config, split
        self._steps_done = steps_done
        self._pin_memory, self._synchronize = pin_memory, synchronize
        self.data_wait_s = 0.0
        """Seconds that training has waited for batches and for their transfer to the device."""

    def sampler(self, start: int, rank: int) -> InfiniteDistributedBatchSampler:
        """Build the sampler of this run's batches for a rank."""
        return build_train_sampler(self._config, self.split, rank, start)

    def train_dataloader(self) -> Iterable[Any]:
        """Return an endless iterable of batches; the stopping rules end the run."""
        assert self.trainer is not None
        start, rank = self._steps_done(), self.trainer.global_rank
        batches = _load(lambda done: self.sampler(start + done, rank), self.split, self._config, self._pin_memory)
        return _TimedIterator(batches, self._add_wait)

    def _add_wait(self, seconds: float) -> None:
        self.data_wait_s += seconds

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Move a batch to the device and time it; Lightning calls this before each step."""
        if device.type == "cpu":
            return batch
        start = time.perf_counter()
        moved = batch.to(device, non_blocking=self._pin_memory)
        self._synchronize()
        self._add_wait(time.perf_counter() - start)
        return moved
