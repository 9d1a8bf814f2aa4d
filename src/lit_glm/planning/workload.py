"""Workload of a step: FLOPs of the slowest rank, from the lengths of the examples and the training sampler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Tuple

import numpy as np

from lit_glm.config.schema import TrainConfig
from lit_glm.data.memmap_dataset import SequenceLengths, open_dataset
from lit_glm.data.sampler import InfiniteDistributedBatchSampler, build_train_sampler
from lit_glm.isolated_process import share_isolated_process
from lit_glm.metrics.flops import FlopCounter

_MAX_SAMPLED_STEPS = 200
"""Maximum number of steps over which the FLOPs of the slowest rank are averaged."""
_MAX_SAMPLED_EXAMPLES = 2**17
"""Maximum number of examples in these steps."""
_TYPICAL_TRAIN, _TYPICAL_EVAL = 100_730, 10_000
"""Queries of ReCoRD (Zhang et al. 2018, table 2): one example each, used if the data is not available."""


@dataclass
class TypicalExamples:
    """Lengths of examples similar to ReCoRD's, used if the data is not available: one context per example."""

    example_rows: Any
    example_candidate_end: Any
    example_group_end: Any
    group_context_end: Any
    group_candidates: Any
    candidate_token_end: Any

    @classmethod
    def like_record(cls, count: int, most_rows: int) -> "TypicalExamples":
        """Generate lengths similar to ReCoRD's: contexts of 290 +- 130 tokens, 3 to 10 candidates of 2 to 5 tokens.

        Args:
            count: number of examples.
            most_rows: `data.max_seq_length`, to which contexts are cut.
        """
        draw = np.random.default_rng(0)
        context = np.clip(draw.normal(290, 130, count), 60, most_rows - 8).astype(int)
        candidates = np.clip(draw.poisson(10.5, count), 3, 10)
        tokens = draw.integers(2, 6, int(candidates.sum()))

        def ends(lengths: Any) -> Any:
            return np.concatenate([[0], np.cumsum(lengths)])

        candidate_end = ends(candidates)
        predicting = np.add.reduceat(tokens, candidate_end[:-1])
        return cls(context + predicting, candidate_end, np.arange(count + 1), ends(context), candidates, ends(tokens))

    def __len__(self) -> int:
        return len(self.example_rows)


def load_examples(config: TrainConfig) -> "Tuple[Any, Any, str]":
    """Load the training and evaluation examples of a configuration, and describe their source.

    Raises:
        InputError: if an existing file cannot be read.
    """
    from lit_glm.data.synthetic import ensure_synthetic_data

    if config.data.synthetic is not None:
        ensure_synthetic_data(config.data)
    files = config.data.train_file, config.data.eval_file
    if all(Path(file).is_file() for file in files):
        with share_isolated_process():
            train, eval_examples = (open_dataset(file, False, config.data.cache_dir) for file in files)
        return train, eval_examples, "lengths of the data"
    typical, few = (
        TypicalExamples.like_record(count, config.data.max_seq_length) for count in (_TYPICAL_TRAIN, _TYPICAL_EVAL)
    )
    return typical, few, f"{config.data.train_file} not found: lengths similar to ReCoRD's"


class Workload:
    """Workload of a configuration's steps."""

    def __init__(self, config: TrainConfig, train: Any, eval_examples: Any) -> None:
        """Average over some steps.

        Args:
            config: run configuration.
            train: training examples.
            eval_examples: evaluation examples; None: evaluations are not needed.
        """
        self._config = config
        self.sampler = build_train_sampler(config, train)
        self.ranks = config.topology.world_size
        self.counter = FlopCounter(config, train, self.sampler)
        self.lengths = SequenceLengths.from_dataset(train)
        self.has_enough_examples = len(train) >= config.global_batch
        self.slowest_rank_flops, self.mean_rank_flops = (
            self._average_flops() if self.has_enough_examples else (0.0, 0.0)
        )
        self.evaluation_flops = 0.0 if eval_examples is None else self._evaluation(eval_examples)
        """FLOPs of one evaluation, all ranks together."""

    def _average_flops(self) -> Tuple[float, float]:
        """Average the FLOPs per step of the slowest rank and of all ranks, over steps that the run reaches."""
        last = max(1, min(self.sampler.steps_per_epoch - 1, self.steps()))
        count = min(_MAX_SAMPLED_STEPS, max(1, _MAX_SAMPLED_EXAMPLES // self._config.global_batch), last)
        first = 1 if count == last else 2  # the first step may be configured to hold the longest examples
        steps = np.unique(np.linspace(first, last, count).astype(int))
        work = np.stack([self.counter.flops_by_rank(int(step)) for step in steps])
        return float(work.max(axis=1).mean()), float(work.mean())

    def _evaluation(self, eval_examples: Any) -> float:
        """Return the FLOPs of one evaluation, all ranks together: a third of training on the same examples."""
        alone = InfiniteDistributedBatchSampler(len(eval_examples), self._config.eval_bs, 0, 1, 0)
        counter = FlopCounter(self._config, eval_examples, alone)
        count = min(alone.steps_per_epoch, _MAX_SAMPLED_STEPS)
        done = sum(float(counter.flops_by_rank(step).sum()) for step in range(1, count + 1))
        return done / count * alone.steps_per_epoch / 3.0

    def steps(self) -> int:
        """Return the number of steps until the sample limit or the step limit."""
        return self._config.total_steps

    def evaluations(self, steps: int) -> int:
        """Return the number of evaluations during training, the last one included, the one before training excluded."""
        run, batch = self._config.run, self._config.global_batch
        if not run.evaluate:
            return 0
        every = -(-run.eval_interval_samples // batch)
        first = max(2, -(-run.eval_start_samples // batch))
        at_the_end = {steps, *range(-(-run.max_samples // batch), steps + 1)}
        by_interval = max(0, steps // every - (first - 1) // every)
        return by_interval + sum(step < first or step % every != 0 for step in at_the_end)
