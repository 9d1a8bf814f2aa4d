"""Lightning callback that times each step, runs evaluations and checkpoints, and updates the run folder.

| Lightning hook        | phase                    | FlagPerf event              | metric            |
| --------------------- | ------------------------ | --------------------------- | ----------------- |
| before fit            | init                     | INIT_START                  | init_time         |
| on_train_start        | init, first evaluation   | INIT_EVALUATION, INIT_END   | init_time         |
| on_train_start, end   | training begins          | TRAIN_START, EPOCH_BEGIN    | raw_train_time    |
| on_train_batch_start  | end of waiting for data  | STEP_BEGIN                  | no_eval_time      |
| on_train_batch_end    | step computed            | STEP_END                    | pure_compute_time |
| on_train_batch_end    | evaluation, checkpoint   | EVALUATE                    | raw_train_time    |
| on_train_end          | training ends            | EPOCH_END, TRAIN_END        | raw_train_time    |
| after fit             | result                   | FINISHED                    | e2e_time          |
"""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import pytorch_lightning as pl

from lit_glm.data.datamodule import RecordDataModule, evaluation_batches
from lit_glm.data.memmap_dataset import MemmapDataset
from lit_glm.errors import RunError
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.metrics.loggers import MetricLogging
from lit_glm.metrics.perf_events import PerfEvents
from lit_glm.metrics.run_metrics import RunMetrics
from lit_glm.metrics.timing import PhaseDurations, PhaseTimer, StepTimes
from lit_glm.runs import checkpoints
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.run_folder import discard_previous_run
from lit_glm.runs.run_writer import RunWriter
from lit_glm.training.evaluation import evaluate, has_converged, has_reached_limit, is_evaluation_due
from lit_glm.training.module import RecordModule, StepMetrics

log = logging.getLogger(__name__)

_FIRST = 3  # consecutive skipped steps before the first warning: loss scaling alone skips one occasionally


class BenchmarkCallback(pl.Callback):
    """Callback that measures phases and triggers evaluation, stopping and checkpoints; rank 0 also writes files."""

    def __init__(
        self,
        job: JobSpec,
        run_dir: Path,
        runtime: Runtime,
        data: RecordDataModule,
        eval_split: MemmapDataset,
        heartbeat: Callable[[], None],
        fingerprint: str,
    ) -> None:
        """Initialise timers and metrics.

        Args:
            job: the job.
            run_dir: its run folder.
            runtime: runtime of this rank's device.
            data: training data.
            eval_split: evaluation examples.
            heartbeat: called at every step and every evaluation batch.
            fingerprint: hash of training and evaluation data, for the result.
        """
        self.config, self.runtime, self._data, self._eval_split = job.config, runtime, data, eval_split
        self._job, self._run_dir, self._heartbeat = job, run_dir, heartbeat
        self._sampler = data.sampler(0, 0)
        self.timer = PhaseTimer(lambda: data.data_wait_s)
        self.run_metrics = RunMetrics(job.config, runtime, self.timer, self._sampler, job.start_time, fingerprint)
        self.events = PerfEvents(job.config, self.run_metrics)
        self.metric_logging = MetricLogging(self.run_metrics)
        self._consecutive_skipped = 0
        self.step_metrics: Optional[StepMetrics] = None
        """Metrics of the latest step."""
        self.interrupted = False
        self._has_ended = False
        self.memory_base: Optional[float] = None
        """Bytes in use on the device before the model was created."""
        self.current_activity = "before the first step"
        """Current activity, for error messages."""
        self.final_durations: Optional[Tuple[PhaseDurations, float]] = None
        """Phase durations and seconds since the entry of `train`, both at the end of training."""
        self._epoch = -1
        self._saved_step = -1

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Finish initialisation: run the first evaluation, or continue an interrupted run."""
        module: RecordModule = pl_module
        module.train()
        step, run_metrics = module.steps_done, self.run_metrics
        writer = RunWriter(self._run_dir, step, self._job.is_resume) if trainer.is_global_zero else None
        run_metrics.begin(writer, step)
        if writer is not None:
            self.events.open(writer.path)
        state: Any = (writer.accuracy, writer.evaluated_step, run_metrics.earlier_e2e) if writer is not None else None
        run_metrics.accuracy, run_metrics.evaluated_step, run_metrics.earlier_e2e = trainer.strategy.broadcast(state)
        is_new = step == 0 and self.run_metrics.evaluated_step < 0
        if is_new:
            self.events.submitted((len(self._data.split), len(self._eval_split)))
        self.events.emit("INIT_START", ago=run_metrics.e2e())
        if is_new and self.config.run.evaluate:
            # If stopped during this evaluation, train no step: a resumed run starts with the evaluation.
            self.interrupted = self._evaluate(trainer, module, "INIT_EVALUATION") is None
            trainer.should_stop = self.interrupted
        run_metrics.init_seconds = run_metrics.e2e()
        self.metric_logging.begin(trainer.loggers, -1 if is_new else run_metrics.evaluated_step)
        self.events.emit("INIT_END")
        if trainer.is_global_zero:
            discard_previous_run(self._run_dir)  # no input can be rejected any more
        self.events.emit("TRAIN_START")
        self.timer.training_starts()
        self.run_metrics.write(module)  # so that a run killed before its first step has its times
        if step > 0:
            # The run may have been stopped between a step and its evaluation or checkpoint.
            self._after_step(trainer, module, None)
        self.metric_logging.log(trainer.loggers, step, {})

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record that the batch is on the device, and emit the start events."""
        step = pl_module.steps_done + 1
        self.current_activity = f"in step {step}"
        epoch = self._sampler.epoch_of(step)
        if epoch != self._epoch:
            if self._epoch >= 0:
                self.events.emit("EPOCH_END", {"epoch": self._epoch})
            self.events.emit("EPOCH_BEGIN", {"epoch": epoch})
            self._epoch = epoch
        self.events.emit("STEP_BEGIN", step=step)
        self.runtime.synchronize()
        self.timer.batch_ready()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the step, then evaluate, stop and save where due."""
        self.runtime.after_step()
        self.runtime.synchronize()
        times = self.timer.step_computed()
        module: RecordModule = pl_module
        self._heartbeat()
        assert module.pending_metrics is not None
        self.step_metrics = module.pending_metrics.read()  # the device is already synchronised: no extra wait
        self._write_step(module.steps_done, self.step_metrics, times)
        self._after_step(trainer, module, times)
        self.metric_logging.step(trainer.loggers, module.steps_done, self.step_metrics)
        self._check_divergence(module.steps_done, self.step_metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record the final durations; Lightning's teardown is not included."""
        if trainer.should_stop and not self._has_ended:  # stopped by a callback of the user
            self._after_step(trainer, pl_module, None, is_last=True)
        self.final_durations = (self.run_metrics.durations(), self.run_metrics.e2e())
        if self._epoch >= 0:
            self.events.emit("EPOCH_END", {"epoch": self._epoch})
        self.events.emit("TRAIN_END")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the result of the completed steps, so that its counters and its times belong together."""
        with suppress(Exception):  # the exception itself is reported
            self.run_metrics.write(pl_module)

    # -- after a step ------------------------------------------------------------------------------------------

    def _check_divergence(self, step: int, values: StepMetrics) -> None:
        """Count consecutive steps without an update, the same on every rank; rank 0 prints warnings.

        Raises:
            RunError: if `run.max_skipped_steps` is reached.
        """
        count = self._consecutive_skipped = 0 if values.grad_norm is not None else self._consecutive_skipped + 1
        limit, first = self.config.run.max_skipped_steps, step - count + 1
        if count < min(_FIRST, limit):
            return
        skipped = f"{count} consecutive steps without an update (from step {first})"
        message = f"{skipped}: loss or gradient is not finite (loss {values.loss:g})"
        if count >= limit:
            raise RunError(
                f"diverged: {message}; limit: run.max_skipped_steps={limit}; use a lower lr, or check the data and "
                "precision.loss_scale",
                summary=f"diverged: {skipped}",
            )
        if self.run_metrics.writer is not None and (count & (count - 1) == 0 or count == _FIRST):
            log.warning(f"step {step}: {message}")

    def _write_step(self, step: int, values: StepMetrics, times: StepTimes) -> None:
        if self.run_metrics.writer is None:
            return
        self.run_metrics.writer.steps.add(
            step=step,
            epoch=self._epoch,
            samples=step * self.config.global_batch,
            loss=values.loss,
            lr=values.lr,
            grad_norm=values.grad_norm,
            data_s=round(times.data, 7),
            compute_s=round(times.compute, 7),
            step_s=round(times.step, 7),
            loss_scale=values.loss_scale,
        )

    def _after_step(
        self, trainer: pl.Trainer, module: RecordModule, times: Optional[StepTimes], is_last: bool = False
    ) -> None:
        """Evaluate, stop and save where due; `times` is None if the step has been recorded already."""
        config, step = self.config, module.steps_done
        stop = bool(module.pending_metrics and module.pending_metrics.stop_requested)
        limit = is_last or has_reached_limit(step, config.global_batch, config.run)
        reached = has_converged(self.run_metrics.accuracy, config.run)  # before training: now it counts
        due = config.run.evaluate and (is_evaluation_due(step, config.global_batch, config.run) or limit or reached)
        evaluated = None
        if due and self.run_metrics.evaluated_step < step and not stop:
            with self.timer.pause():
                evaluated = self._evaluate(trainer, module, None)
                stop = evaluated is None
        unevaluated = due and self.run_metrics.evaluated_step < step  # stopped: evaluated on resume
        ends = (limit or has_converged(self.run_metrics.accuracy, config.run)) and not unevaluated
        if times is not None and self.step_metrics is not None:
            schedule: Any = module.lr_schedulers()
            self.events.step_ended(step, self._epoch, self.step_metrics, schedule.get_last_lr()[0], times.step, ends)
        if evaluated is not None:
            self.events.emit("EVALUATE", evaluated)
        if stop or ends:
            trainer.should_stop = self._has_ended = True
            self.interrupted = stop and not ends
        every = config.run.checkpoint_interval_steps
        due_to_save = every is not None and (step % every == 0 or stop or ends)
        if (times is not None or is_last) and due_to_save and self._saved_step < step:
            self._saved_step = step
            self.current_activity = f"saving step {step}"
            with self.timer.pause():
                self.run_metrics.write(module, durable=True)  # metrics must be on disk before the checkpoint
                trainer.save_checkpoint(checkpoints.checkpoint_path(self._run_dir, step), weights_only=False)
                if trainer.is_global_zero:
                    checkpoints.prune(self._run_dir)
        if self.run_metrics.writer is not None and (self.run_metrics.writer.is_stale() or evaluated is not None):
            self.run_metrics.write(module)

    def _evaluate(self, trainer: pl.Trainer, module: RecordModule, event: Optional[str]) -> Optional[Dict[str, Any]]:
        """Evaluate; return None if any rank has received a stop signal during the evaluation."""
        start, step = time.perf_counter(), module.steps_done
        self.current_activity = f"in the evaluation after step {step}"
        rank, world_size = trainer.global_rank, trainer.world_size
        loader = evaluation_batches(self._eval_split, self.config, rank, world_size, self.runtime.pins_memory)

        def stops() -> bool:
            self._heartbeat()
            return module.stop_requested

        def any_rank(stopped: bool) -> bool:
            return trainer.strategy.reduce_boolean_decision(stopped, all=False)

        with trainer.precision_plugin.forward_context():
            accuracy, _ = evaluate(module, loader, self.runtime, stops, any_rank)
        if accuracy is None:
            return None
        self.runtime.synchronize()
        seconds = time.perf_counter() - start
        self.run_metrics.accuracy, self.run_metrics.evaluated_step = accuracy, step
        if event is not None:
            self.events.emit(event, {"eval_accuracy": accuracy, "time": seconds})
        if self.run_metrics.writer is not None:
            samples = step * self.config.global_batch
            self.run_metrics.writer.evals.add(step=step, samples=samples, acc=accuracy, seconds=round(seconds, 6))
        return {"global_steps": step, "eval_accuracy": accuracy, "time": seconds}


def find_benchmark_callback(trainer: Any) -> BenchmarkCallback:
    """Return the `BenchmarkCallback` of a trainer."""
    return next(entry for entry in trainer.callbacks if isinstance(entry, BenchmarkCallback))
