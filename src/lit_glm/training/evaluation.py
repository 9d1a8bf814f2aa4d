"""Scores a model on this rank's share of the evaluation set."""

from typing import Any, Callable, Iterable, List, Optional, Tuple

import torch

from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.training.metrics import ExactMatch

OnBatch = Callable[[], bool]
"""Called after each batch; True ends the evaluation early."""


def evaluate(
    module: Any,
    loader: Iterable[Any],
    runtime: Runtime,
    on_batch: Optional[OnBatch] = None,
    anybody: Callable[[bool], bool] = bool,
) -> Tuple[Optional[float], List[Tuple[int, int]]]:
    """Choose a candidate for each example.

    Args:
        module: batch to [B, C] scores; left in the mode it came in.
        loader: batches of this rank.
        runtime: of the device that the model is on.
        on_batch: see `OnBatch`.
        anybody: whether any rank ended early, given whether this one did.

    Returns:
        Accuracy over all ranks (None if ended early), and (example, chosen candidate) of this rank's examples.
    """
    metric = ExactMatch().to(module.device)
    training = module.training
    module.eval()
    chosen: List[Tuple[int, int]] = []
    stopped = False

    def count(batch: Any, read: Callable[[], List[int]]) -> None:
        best = read()
        metric.update(best, batch.answers)
        chosen.extend(zip(batch.indices, best))

    waiting: Optional[Tuple[Any, Callable[[], List[int]]]] = None
    try:
        with torch.no_grad():
            for batch in loader:
                best = module(batch.to(module.device, non_blocking=runtime.pins_memory)).argmax(dim=1)
                # The batch before is read while the device computes this one.
                before, waiting = waiting, (batch, runtime.read_later(best))
                if before is not None:
                    count(*before)
                if on_batch is not None and on_batch():
                    stopped = True
                    break
        if waiting is not None:
            count(*waiting)
        return (None if anybody(stopped) else float(metric.compute())), chosen
    finally:
        module.train(training)
