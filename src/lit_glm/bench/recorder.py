"""The phase callback: measures every step, evaluates and saves when due, and keeps the run folder up to date.

| Lightning hook        | phase                    | FlagPerf event              | figure            |
| --------------------- | ------------------------ | --------------------------- | ----------------- |
| before fit            | init                     | INIT_START                  | init_time         |
| on_train_start        | init, first evaluation   | INIT_EVALUATION, INIT_END   | init_time         |
| on_train_start, end   | training begins          | TRAIN_START, EPOCH_BEGIN    | raw_train_time    |
| on_train_batch_start  | data waited for          | STEP_BEGIN                  | no_eval_time      |
| on_train_batch_end    | step computed            | STEP_END                    | pure_compute_time |
| on_train_batch_end    | evaluation, checkpoint   | EVALUATE                    | raw_train_time    |
| on_train_end          | training ends            | EPOCH_END, TRAIN_END        | raw_train_time    |
| after fit             | result                   | FINISHED                    | e2e_time          |
"""

import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytorch_lightning as pl

from lit_glm.bench.clock import PhaseClock, StepTimes
from lit_glm.bench.figures import Seconds, figures
from lit_glm.bench.run_folder import RunFolder
from lit_glm.bench.tables import Table
from lit_glm.bench.work import Work, utilisation
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.training.evaluation import evaluate
from lit_glm.training.module import RecordModule, StepOutcome
from lit_glm.training.schedule import converged, evaluation_due, reached_limit


class Recorder(pl.Callback):
    """Drives evaluation, stopping and saving, and measures; on every rank, with files on rank 0."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        entry: float,
        open_folder: Callable[[int], Optional[RunFolder]],
        eval_loader: Callable[[int, int], Any],
        epoch_of: Callable[[int], int],
        save: Callable[[Any, int], None],
        beat: Callable[[], None],
        waited: Callable[[], float],
        examples: Tuple[int, int],
    ) -> None:
        """Get ready.

        Args:
            config: the run's.
            runtime: to synchronise.
            entry: `time.monotonic()` at the entry of `train`.
            open_folder: steps done -> the run folder, on rank 0; None elsewhere.
            eval_loader: (rank, world size) -> batches to evaluate on.
            epoch_of: step -> epoch.
            save: (trainer, step) writes a checkpoint.
            beat: called at every step and every batch of an evaluation: a sign of life.
            waited: seconds that training has waited for data so far.
            examples: how many there are to train and to evaluate on.
        """
        self.config, self._runtime, self._entry = config, runtime, entry
        self._open_folder, self._eval_loader, self._epoch_of, self._save = open_folder, eval_loader, epoch_of, save
        self._beat = beat
        self._examples = examples
        self.listeners: List[Callable[[str, Any, int], None]] = []
        """Told of every event, its value and its time (ms), on the first rank."""
        self.clock = PhaseClock(waited)
        self.folder: Optional[RunFolder] = None
        self.accuracy: Optional[float] = None
        self.interrupted = False
        self._init = 0.0
        self._epoch = -1
        self._saved_step = -1
        self.evaluated_step = -1
        self._steps_here = 0

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End of initialisation: the first evaluation, or the place where an interrupted run goes on."""
        module = self._module(pl_module)
        module.train()
        step = module.steps_done
        if trainer.is_global_zero:
            self.folder = self._open_folder(step)
        told: Any = (self.folder.accuracy, self.folder.evaluated_step) if self.folder else None
        self.accuracy, self.evaluated_step = trainer.strategy.broadcast(told)
        if step == 0 and self.evaluated_step < 0:
            train, evaluation = self._examples
            counts = {"train_examples": train, "eval_examples": evaluation}
            told = {"model": self.config.model.name, "config": self.config.fix_hp, **counts}
            self._event("SUBMIT_INFO", told, ago=self.e2e())
        self._event("INIT_START", ago=self.e2e())
        if step == 0 and self.evaluated_step < 0:
            # Stopped meanwhile: no step is done, so that the run goes on with this evaluation.
            self.interrupted = self._evaluate(trainer, module, "INIT_EVALUATION") is None
            trainer.should_stop = self.interrupted
        self._init = time.monotonic() - self._entry
        self._event("INIT_END")
        self._event("TRAIN_START")
        self.clock.training_starts()
        if step > 0:
            # The run may have been stopped between a step and what follows it.
            self._after_step(trainer, module, trained=False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The batch is here."""
        step = self._module(pl_module).steps_done + 1
        epoch = self._epoch_of(step)
        if epoch != self._epoch:
            if self._epoch >= 0:
                self._event("EPOCH_END", {"epoch": self._epoch})
            self._event("EPOCH_BEGIN", {"epoch": epoch})
            self._epoch = epoch
        self._event("STEP_BEGIN", step=step)
        self._runtime.synchronize()
        self.clock.batch_ready()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done: write it down, then do what is due after it."""
        self._runtime.after_step()
        self._runtime.synchronize()
        times = self.clock.step_computed()
        module = self._module(pl_module)
        outcome, step = module.outcome, module.steps_done
        assert outcome is not None
        self._steps_here += 1
        self._beat()
        if self.folder is not None:
            self.folder.later.do(partial(_add_step, self.folder.steps, self.config, step, self._epoch, outcome, times))
        self._after_step(trainer, module, trained=True, step_seconds=times.step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Training is over; figures follow in `finish`."""
        if self._epoch >= 0:
            self._event("EPOCH_END", {"epoch": self._epoch})
        self._event("TRAIN_END")
        self.do_rest()  # before Lightning closes the loggers

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """What was measured is on the disk before anything else happens."""
        self.do_rest()

    def do_later(self, function: Callable[[], Any]) -> None:
        """Have something done off the step path, on the first rank; nothing on the others."""
        if self.folder is not None:
            self.folder.later.do(function)

    def do_rest(self) -> None:
        """Wait for all that was to be done later."""
        if self.folder is not None:
            self.folder.later.drain()

    # -- after a step ------------------------------------------------------------------------------------------

    def _after_step(self, trainer: pl.Trainer, module: RecordModule, trained: bool, step_seconds: float = 0.0) -> None:
        config, step = self.config, module.steps_done
        # Gradients of a window that is not full are in no checkpoint: neither save nor stop there.
        whole = step % config.optimizer.accumulate == 0
        stop = bool(module.outcome and module.outcome.stop_requested) and whole
        limit = reached_limit(step, config.global_batch, config.run)
        due = evaluation_due(step, config.global_batch, config.run) or limit
        evaluated = None
        if due and self.evaluated_step < step and not stop:
            with self.clock.outside_steps():
                evaluated = self._evaluate(trainer, module, None)
                stop = evaluated is None
        ends = limit or converged(self.accuracy, config.run)
        if trained:
            self._log_step(module, step_seconds, ends)
        if evaluated is not None:
            self._event("EVALUATE", evaluated)
        if stop or ends:
            trainer.should_stop = True
            self.interrupted = stop and not ends
        due_to_save = (step % config.run.checkpoint_interval_steps == 0 and whole) or stop or ends
        if trained and due_to_save and self._saved_step < step:
            self._saved_step = step
            with self.clock.outside_steps():
                self.do_rest()  # no checkpoint is ahead of steps.csv
                self._save(trainer, step)
        if self.folder is not None and (self.folder.stale() or evaluated is not None):
            self.folder.write_later(step, module.steps_skipped, self.seconds(), self.e2e())

    def _evaluate(self, trainer: pl.Trainer, module: RecordModule, event: Optional[str]) -> Optional[Dict[str, Any]]:
        """Evaluate; None if any rank was asked to stop meanwhile."""
        start = time.perf_counter()
        loader = self._eval_loader(trainer.global_rank, trainer.world_size)

        def stops() -> bool:
            self._beat()
            return module.stop_requested

        def anybody(stopped: bool) -> bool:
            decide: bool = trainer.strategy.reduce_boolean_decision(stopped, all=False)
            return decide

        with trainer.precision_plugin.forward_context():
            accuracy, _ = evaluate(module, loader, module.device, stops, anybody)
        if accuracy is None:
            return None
        self._runtime.synchronize()
        seconds = time.perf_counter() - start
        self.accuracy = accuracy
        self.evaluated_step = module.steps_done
        if event is not None:
            self._event(event, {"eval_accuracy": accuracy, "time": seconds})
        if self.folder is not None:
            step = module.steps_done
            samples = step * self.config.global_batch
            self.folder.later.do(partial(self.folder.add_evaluation, step, samples, accuracy, seconds))
        return {"global_steps": module.steps_done, "eval_accuracy": accuracy, "time": seconds}

    def _log_step(self, module: RecordModule, step_seconds: float, ends: bool) -> None:
        if self.folder is None:
            return
        outcome, seconds = module.outcome, self.clock.seconds() + self.folder.earlier()
        assert outcome is not None
        loss = outcome.own_loss / self.config.optimizer.accumulate
        schedule: Any = module.lr_schedulers()
        step = module.steps_done
        value = {
            "global_steps": step,
            "num_trained_samples": step * self.config.global_batch,
            "epoch": self._epoch,
            "loss": loss,
            "eval_accuracy": self.accuracy,
            "no_eval_time": seconds.no_eval,
            "pure_compute_time": seconds.pure_compute,
            "learning_rate": schedule.rate,
            "seq/s": self.config.global_batch / step_seconds if step_seconds else None,
            "end_training": ends,
        }
        if outcome.loss_scale is not None:
            value["loss_scale"] = outcome.loss_scale
        self._event("STEP_END", value, step=step, loss=loss)

    # -- figures -----------------------------------------------------------------------------------------------

    def seconds(self) -> Seconds:
        """Measured by this rank in this process."""
        seconds = self.clock.seconds()
        seconds.init = self._init
        return seconds

    def samples_here(self) -> int:
        """Samples of the steps that this process has done."""
        return self._steps_here * self.config.global_batch

    def peak_memory(self) -> Optional[float]:
        """Highest memory in use by this rank, bytes."""
        return self._runtime.peak_memory(0)

    def total_steps(self) -> int:
        """Steps of the run if the target is not reached before."""
        run = self.config.run
        by_samples = run.max_samples // self.config.global_batch + 1
        return by_samples if run.max_steps is None else min(run.max_steps, by_samples)

    def e2e(self) -> float:
        """Seconds since the entry of `train`."""
        return time.monotonic() - self._entry

    def finish(
        self,
        status: str,
        module: RecordModule,
        seconds: Seconds,
        e2e: float,
        memory: Optional[float],
        work: Work,
        rank_imbalance: Optional[float],
    ) -> Dict[str, Any]:
        """Write the final result (rank 0).

        Args:
            status: how the run ended.
            module: for its counters.
            seconds: of the slowest rank in each phase.
            e2e: seconds since the entry of `train`.
            memory: highest memory in use, bytes.
            work: of all steps.
            rank_imbalance: see `WorkCounter.imbalance`.
        """
        assert self.folder is not None
        self.do_rest()
        all_seconds = seconds + self.folder.earlier()
        p_core = figures(module.steps_done * self.config.global_batch, all_seconds)["p_core"]
        rates = utilisation(self.config, work, all_seconds.pure_compute, p_core)
        if rates["mfu"] is not None and rates["mfu"] > 1:
            rates["mfu_above_one"], rates["mfu"] = rates["mfu"], None  # no figure rather than a wrong one
        result = self.folder.write(
            status,
            module.steps_done,
            module.steps_skipped,
            seconds,
            e2e,
            memory=memory,
            rank_imbalance=rank_imbalance,
            model_flops=work.flops,
            **rates,
        )
        self._event(
            "FINISHED",
            {
                "e2e_time": result["e2e_time"],
                "global_steps": module.steps_done,
                "num_trained_samples": result["num_trained_samples"],
                "training_sequences_per_second": result["p_whole"],
                "converged": result["converged"],
                "final_accuracy": self.accuracy,
                "raw_train_time": result["raw_train_time"],
                "init_time": result["init_time"],
                "pure_training_computing_time": result["pure_compute_time"],
                "throughput(ips)_raw": result["p_whole"],
                "throughput(ips)_no_eval": result["p_train"],
                "throughput(ips)_pure_compute": result["p_core"],
            },
        )
        self.do_rest()
        return result

    def _event(self, name: str, value: Optional[Any] = None, ago: float = 0.0, **keys: Any) -> None:
        """Something happened, so many seconds ago."""
        if self.folder is not None:
            time_ms = int(1e3 * (time.time() - ago))
            self.folder.perf.event(name, value, time_ms, **keys)
            for listener in self.listeners:
                listener(name, value, time_ms)

    @staticmethod
    def _module(pl_module: Any) -> RecordModule:
        assert isinstance(pl_module, RecordModule)
        return pl_module


def _add_step(table: Table, config: TrainConfig, step: int, epoch: int, outcome: StepOutcome, times: StepTimes) -> None:
    """A line of steps.csv; values are fetched from the device here."""
    table.add(
        step=step,
        epoch=epoch,
        samples=step * config.global_batch,
        loss=float(outcome.loss),
        lr=outcome.lr,
        grad_norm=None if outcome.grad_norm is None else float(outcome.grad_norm),
        data_s=round(times.data, 7),
        compute_s=round(times.compute, 7),
        step_s=round(times.step, 7),
        loss_scale=outcome.loss_scale,
    )
