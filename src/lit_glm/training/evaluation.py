"""Scores a model on this rank's share of the evaluation set."""

from typing import Any, Callable, Iterable, List, Optional, Tuple

import torch

from lit_glm.training.metrics import ExactMatch

OnBatch = Callable[[], bool]
"""Called after each batch; True ends the evaluation early."""


def evaluate(
    module: Any,
    loader: Iterable[Any],
    device: torch.device,
    on_batch: Optional[OnBatch] = None,
    anybody: Callable[[bool], bool] = bool,
) -> Tuple[Optional[float], List[Tuple[int, int]]]:
    """Choose a candidate for each example.

    Args:
        module: batch to [B, C] scores; left in the mode it came in.
        loader: batches of this rank.
        device: where the model is.
        on_batch: see `OnBatch`.
        anybody: whether any rank ended early, given whether this one did.

    Returns:
        Accuracy over all ranks (None if ended early), and (example, chosen candidate) of this rank's examples.
    """
    metric = ExactMatch().to(device)
    training = module.training
    module.eval()
    chosen: List[Tuple[int, int]] = []
    stopped = False
    try:
        with torch.no_grad():
            for batch in loader:
                best = module(batch.to(device)).argmax(dim=1)
                metric.update(best, batch.answers)
                chosen += zip(batch.indices, best.tolist())
                if on_batch is not None and on_batch():
                    stopped = True
                    break
        return (None if anybody(stopped) else float(metric.compute())), chosen
    finally:
        module.train(training)
