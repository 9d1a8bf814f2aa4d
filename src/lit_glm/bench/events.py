"""What happens in a run, as FlagPerf's events: written to perf.log.

perf.log keeps FlagPerf's conventions: the first rank's own loss, the learning rate after the scheduler's step, samples
as steps x global batch.
"""

import time
from typing import Any, Dict, Optional, Tuple

from lit_glm.bench.account import Account
from lit_glm.bench.perflog import PerfLog
from lit_glm.config.schema import TrainConfig
from lit_glm.training.module import StepValues


class Events:
    """Does nothing until it has a log: on the first rank alone."""

    def __init__(self, config: TrainConfig, account: Account) -> None:
        self._config, self._account = config, account
        self.log: Optional[PerfLog] = None

    def tell(self, name: str, value: Optional[Any] = None, ago: float = 0.0, **keys: Any) -> None:
        """Something happened, so many seconds ago."""
        if self.log is None:
            return
        time_ms = int(1e3 * (time.time() - ago))
        self.log.event(name, value, time_ms, **keys)

    def submitted(self, examples: Tuple[int, int]) -> None:
        """A run that has not been here before; the numbers are of its examples to train and to evaluate on."""
        config = self._config
        told = {"model": config.model.name, "config": config.fix_hp}
        counts = {"train_examples": examples[0], "eval_examples": examples[1]}
        self.tell("SUBMIT_INFO", {**told, **counts}, ago=self._account.e2e())

    def step_ended(self, step: int, epoch: int, values: StepValues, next_lr: float, seconds: float, ends: bool) -> None:
        """A step is done, and its evaluation if one was due.

        Args:
            step: counted from 1.
            epoch: from 0.
            values: what came of it.
            next_lr: after the scheduler's step.
            seconds: of the whole step.
            ends: whether training ends with it.
        """
        if self.log is None:
            return
        config, so_far = self._config, self._account.all_seconds()
        loss = values.own_loss / config.optimizer.accumulate
        value: Dict[str, Any] = {
            "global_steps": step,
            "num_trained_samples": step * config.global_batch,
            "epoch": epoch,
            "loss": loss,
            "eval_accuracy": self._account.accuracy,
            "no_eval_time": so_far.no_eval,
            "pure_compute_time": so_far.pure_compute,
            "learning_rate": next_lr,
            "seq/s": config.global_batch / seconds if seconds else None,
            "end_training": ends,
        }
        if values.loss_scale is not None:
            value["loss_scale"] = values.loss_scale
        self.tell("STEP_END", value, step=step, loss=loss)

    def finished(self, result: Dict[str, Any]) -> None:
        """The run has its result."""
        steps = result["global_steps"]
        self.tell(
            "FINISHED",
            {
                "e2e_time": result["e2e_time"],
                "global_steps": steps,
                "num_trained_samples": steps * self._config.global_batch,
                "training_sequences_per_second": result["p_whole"],
                "converged": result["converged"],
                "final_accuracy": result["acc"],
                "raw_train_time": result["raw_train_time"],
                "init_time": result["init_time"],
                "pure_training_computing_time": result["pure_compute_time"],
                "throughput(ips)_raw": result["p_whole"],
                "throughput(ips)_no_eval": result["p_train"],
                "throughput(ips)_pure_compute": result["p_core"],
            },
        )
