"""Steps without an update: said while the run goes on, and too many in a row end it."""

import sys

from lit_glm.errors import RunError
from lit_glm.training.module import StepMetrics

_FIRST = 3  # in a row, from which a run is said to have diverged: loss scaling alone skips a few now and then


class DivergenceGuard:
    """Counts them; every rank counts the same."""

    def __init__(self, most: int) -> None:
        """Begin.

        Args:
            most: `run.max_skipped_steps`: so many in a row end the run.
        """
        self._most = most
        self._row = 0

    def check_step(self, step: int, values: StepMetrics, speaks: bool) -> None:
        """Look at a step.

        Args:
            step: counted from 1.
            values: what came of it.
            speaks: whether this rank says it.

        Raises:
            RunError: if it was one too many.
        """
        self._row = 0 if values.grad_norm is not None else self._row + 1
        if self._row < min(_FIRST, self._most):
            return
        first = step - self._row + 1
        what = (
            f"no update in {self._row} steps in a row (from step {first}): loss or gradient is not finite "
            f"(loss {values.loss:g})"
        )
        if self._row >= self._most:
            raise RunError(
                f"the run has diverged: {what}; that is run.max_skipped_steps={self._most}. Take a lower lr, or look "
                "at the data and at precision.loss_scale",
                summary=f"diverged: {self._row} steps in a row without an update, from step {first}",
            )
        if speaks and (self._row & (self._row - 1) == 0 or self._row == _FIRST):
            print(f"lit_glm: step {step}: {what}", file=sys.stderr, flush=True)
