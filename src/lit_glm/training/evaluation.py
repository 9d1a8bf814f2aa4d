"""Evaluation of a model: when it is due, the loop over batches, exact match as published, EM and F1 on text."""

import math
import re
import string
from collections import Counter
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_glm.config.schema import RunConfig
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.scoring import best_candidates


class ExactMatch(Metric):
    """Share of examples whose chosen candidate is a correct answer, over all ranks."""

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, chosen: Sequence[int], answers: List[Tuple[int, ...]]) -> None:
        """Add a batch."""
        self.correct += sum(int(choice) in right for choice, right in zip(chosen, answers))
        self.total += len(answers)

    def compute(self) -> Tensor:
        """Return the share; NaN without examples."""
        return self.correct.cpu().double() / self.total.cpu().double()  # not every device has float64


def normalise_answer(text: str) -> str:
    """Normalise a text as ReCoRD (SQuAD) does: lower case, no punctuation, no articles, single spaces."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def em_and_f1(prediction: str, answers: Sequence[str]) -> Tuple[float, float]:
    """Compute EM and token-level F1 of a predicted text, each the best over the correct answers.

    As in ReCoRD's official evaluation script (Zhang et al. 2018, https://sheng-z.github.io/ReCoRD-explorer).
    """
    exact, best = 0.0, 0.0
    predicted = normalise_answer(prediction).split()
    for answer in answers:
        tokens = normalise_answer(answer).split()
        exact = max(exact, float(predicted == tokens))
        common = sum((Counter(predicted) & Counter(tokens)).values())
        if common:
            precision, recall = common / len(predicted), common / len(tokens)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


OnBatch = Callable[[], bool]
"""Called after each batch; True ends the evaluation early."""


def evaluate(
    module: Any,
    loader: Iterable[Any],
    runtime: Runtime,
    on_batch: Optional[OnBatch] = None,
    any_rank: Callable[[bool], bool] = bool,
    scores: Optional[Dict[int, List[float]]] = None,
) -> Tuple[Optional[float], List[Tuple[int, int]]]:
    """Choose a candidate for each example.

    Args:
        module: maps a batch to [B, C] scores; its training mode is restored.
        loader: batches of this rank.
        runtime: runtime of the model's device.
        on_batch: see `OnBatch`.
        any_rank: returns whether any rank ended early, given whether this one did.
        scores: gets the candidates' scores of each example, by its index; None: they are not read from the device.

    Returns:
        Accuracy over all ranks (None if ended early), and (example, chosen candidate or -1) of this rank's examples.
    """
    metric = ExactMatch().to(module.device)
    training = module.training
    module.eval()
    chosen: List[Tuple[int, int]] = []
    stopped = False

    def add_result(batch: Any, read: Callable[[], List[int]], read_table: Callable[[], List[float]]) -> None:
        # No candidate, -1, where no score is above that of padding or one is NaN: a device whose results overflow.
        best = [
            first_equal[choice] if choice < len(first_equal) else -1
            for first_equal, choice in zip(batch.first_equal, read())
        ]
        metric.update(best, batch.answers)
        if scores is not None:
            table, width = read_table(), batch.score_shape[1]
            for number, (index, first_equal) in enumerate(zip(batch.indices, batch.first_equal)):
                scores[index] = [table[number * width + first] for first in first_equal]
        chosen.extend(zip(batch.indices, best))

    waiting: Optional[Tuple[Any, Callable[[], List[int]], Callable[[], List[float]]]] = None
    try:
        with torch.no_grad():
            for batch in loader:
                table = module(batch.to(module.device, non_blocking=runtime.pins_memory))
                best = best_candidates(table)
                # Read the previous batch's result while the device computes this one.
                read_table = runtime.to_host_async(table.reshape(-1)) if scores is not None else list
                before, waiting = waiting, (batch, runtime.to_host_async(best), read_table)
                if before is not None:
                    add_result(*before)
                if on_batch is not None and on_batch():
                    stopped = True
                    break
        if waiting is not None:
            add_result(*waiting)
        return (None if any_rank(stopped) else float(metric.compute())), chosen
    finally:
        module.train(training)


def is_evaluation_due(step: int, global_batch: int, run: RunConfig) -> bool:
    """Return whether an evaluation follows this step by the interval rule."""
    samples = step * global_batch
    if samples >= run.max_samples:
        return True
    every = math.ceil(run.eval_interval_samples / global_batch)
    return step > 1 and samples >= run.eval_start_samples and step % every == 0


def next_evaluation_step(step: int, global_batch: int, run: RunConfig, last: int) -> int:
    """Return the next step after this one that is followed by an evaluation."""
    every = math.ceil(run.eval_interval_samples / global_batch)
    due = max(2, step + 1, math.ceil(run.eval_start_samples / global_batch))
    return min(last, -(-due // every) * every)


def has_reached_limit(step: int, global_batch: int, run: RunConfig) -> bool:
    """Return whether training ends after this step: more than max_samples, or max_steps reached."""
    return step * global_batch > run.max_samples or (run.max_steps is not None and step >= run.max_steps)


def has_converged(accuracy: Optional[float], run: RunConfig) -> bool:
    """Return whether the last evaluation reached the target."""
    return accuracy is not None and accuracy >= run.target_accuracy
