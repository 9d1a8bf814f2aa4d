"""HDF5 files to batches of the chosen scoring, for training and evaluation."""

import time
from functools import partial
from typing import Any, Callable, Iterable, Iterator, List, Union

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from lit_glm.config.schema import TrainConfig
from lit_glm.data.batch import FlatBatch, PaddedBatch
from lit_glm.data.collate import flat_batch, padded_batch
from lit_glm.data.dataloader import Ahead, LoaderProcesses, live_and_die_with_the_rank
from lit_glm.data.memmap_dataset import CompactSplit
from lit_glm.data.sampler import EndlessBatches, order_of

Collate = Callable[[CompactSplit, List[int]], Union[FlatBatch, PaddedBatch]]


class _Batches(Dataset):
    """Batches by the indices of their examples; a loader with `batch_size=None` asks for one at a time."""

    def __init__(self, split: CompactSplit, collate: Collate) -> None:
        self._split, self._collate = split, collate

    def __getitem__(self, indices: List[int]) -> Union[FlatBatch, PaddedBatch]:
        return self._collate(self._split, indices)


def collate_for(config: TrainConfig) -> Collate:
    """What turns examples into a batch of the chosen scoring."""
    if config.scoring.name == "published":
        return partial(_padded, num_tokens=config.data.max_seq_length)
    return flat_batch


def _padded(split: CompactSplit, indices: List[int], num_tokens: int) -> PaddedBatch:
    return padded_batch(split, indices, num_tokens)


def evaluation_batches(
    split: CompactSplit, config: TrainConfig, rank: int = 0, world_size: int = 1, pin_memory: bool = False
) -> Iterable[Any]:
    """This rank's share of the evaluation set in file order; every example belongs to exactly one rank."""
    mine = list(range(rank, len(split), world_size))
    if config.scoring.name == "published":
        batches = [mine[start : start + config.eval_bs] for start in range(0, len(mine), config.eval_bs)]
    else:
        batches = by_rows(mine, split.example_rows, config.eval_bs * config.data.max_seq_length)
    loader = DataLoader(
        _Batches(split, collate_for(config)),
        sampler=batches,
        batch_size=None,
        num_workers=config.data.num_workers,
        worker_init_fn=live_and_die_with_the_rank,
        pin_memory=pin_memory,
    )
    return _ahead(loader)


def by_rows(examples: List[int], rows: Any, most: int) -> List[List[int]]:
    """Cut a list of examples into batches of at most so many rows, in order; a longer example has one of its own.

    Args:
        examples: indices.
        rows: of every example of the data, by its index.
        most: rows of a batch: what `eval_bs` sequences of full length would have.
    """
    batches: List[List[int]] = []
    room = 0
    for example in examples:
        need = int(rows[example])
        if not batches or need > room:
            batches.append([])
            room = most
        batches[-1].append(example)
        room -= need
    return batches


def _ahead(loader: "DataLoader[Any]") -> Iterable[Any]:
    """Loader processes are ahead by themselves."""
    return LoaderProcesses(loader) if loader.num_workers else Ahead(loader)


class _Waited:
    """An iterable that tells how long each of its items was waited for."""

    def __init__(self, source: Iterable[Any], tell: Callable[[float], None]) -> None:
        self._source, self._tell = source, tell

    def __iter__(self) -> Iterator[Any]:
        start = time.perf_counter()
        for item in self._source:
            self._tell(time.perf_counter() - start)
            yield item
            start = time.perf_counter()


class RecordData(pl.LightningDataModule):
    """Training batches of this rank, from any step on."""

    def __init__(
        self,
        config: TrainConfig,
        split: CompactSplit,
        steps_done: Callable[[], int],
        pin_memory: bool,
        synchronize: Callable[[], None],
    ) -> None:
        """Describe the batches.

        Args:
            config: batch size, topology, order.
            split: the training examples.
            steps_done: asked when the loader is built, after a checkpoint has been restored.
            pin_memory: whether copies to the device go through page-locked memory.
            synchronize: waits for the device.
        """
        super().__init__()
        self._config, self.split = config, split
        self._steps_done = steps_done
        self._pin_memory, self._synchronize = pin_memory, synchronize
        self.waited = 0.0
        """Seconds that training has waited for batches and for their way to the device."""

    def sampler(self, start: int, rank: int) -> EndlessBatches:
        """The order of this run's batches for a rank."""
        return order_of(self._config, self.split, rank, start)

    def train_dataloader(self) -> Iterable[Any]:
        """Endless; the run ends by its own rules."""
        assert self.trainer is not None
        loader = DataLoader(
            _Batches(self.split, collate_for(self._config)),
            sampler=self.sampler(self._steps_done(), self.trainer.global_rank),
            batch_size=None,
            num_workers=self._config.data.num_workers,
            worker_init_fn=live_and_die_with_the_rank,
            pin_memory=self._pin_memory,
        )
        return _Waited(_ahead(loader), self._wait)

    def _wait(self, seconds: float) -> None:
        self.waited += seconds

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Called by Lightning before each step."""
        if device.type == "cpu":
            return batch
        start = time.perf_counter()
        moved = batch.to(device, non_blocking=self._pin_memory)
        self._synchronize()
        self._wait(time.perf_counter() - start)
        return moved
