"""Running totals of a run: time, samples and memory, including the parts before an interruption."""

import logging
import math
import time
from typing import Any, Dict, List, Optional

from lit_glm.config.schema import TrainConfig
from lit_glm.data.sampler import InfiniteDistributedBatchSampler
from lit_glm.hardware.monitors import is_mig_slice
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.selection import computes_on_cpu
from lit_glm.metrics import timing
from lit_glm.metrics.flops import FlopCounter, compute_mfu, peak_key
from lit_glm.metrics.system_info import ContentionMonitor
from lit_glm.metrics.timing import PhaseDurations, PhaseTimer, throughput_metrics
from lit_glm.runs.environment import environment_changes, read_environment
from lit_glm.runs.result import config_fields
from lit_glm.runs.run_writer import RunWriter
from lit_glm.training.evaluation import has_converged
from lit_glm.training.module import RecordModule

log = logging.getLogger(__name__)

_ABOVE_TOTAL = 1.05
"""Memory in use relative to the device's from which one of the two must be wrong."""


class RunMetrics:
    """Running totals of one rank; on rank 0 they include the earlier parts of a resumed run."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        timer: PhaseTimer,
        sampler: InfiniteDistributedBatchSampler,
        start_time: float,
        data_fingerprint: str = "",
    ):
        """Initialise the totals.

        Args:
            config: run configuration.
            runtime: queried for memory.
            timer: phase timer.
            sampler: sampler of the training examples; gives the number of samples per step.
            start_time: `time.monotonic()` at the entry of `train`.
            data_fingerprint: hash of the data.
        """
        self._data_fingerprint = data_fingerprint
        self.config, self._runtime = config, runtime
        self._timer, self._sampler, self._start_time = timer, sampler, start_time
        self.init_seconds = 0.0
        self.accuracy: Optional[float] = None
        """Accuracy of the latest evaluation."""
        self.evaluated_step = -1
        """Step after which the latest evaluation ran."""
        self.writer: Optional[RunWriter] = None
        self.contention: Optional[ContentionMonitor] = None
        """Contention monitor; only on rank 0."""
        self.missing_data: List[str] = []
        """Data lost from the parts before an interruption; metrics that depend on it are null."""
        self.environment_changes: List[str] = []
        """Differences between the machines on which the parts of this run were measured."""
        self.has_earlier_result = True
        """Whether result.json covers the earlier parts; independent of steps.csv."""
        self._first_step = 0
        self._earlier = PhaseDurations()
        self.earlier_e2e = 0.0
        """Seconds of the parts before an interruption; known on all ranks."""

    def begin(self, writer: Optional[RunWriter], steps_done: int) -> None:
        """Start measuring, before the first step of a new or resumed run."""
        self.writer, self._first_step = writer, steps_done
        if writer is None:
            return
        self.contention = ContentionMonitor(self._runtime, self.config.topology.devices_per_node)
        if writer.resumes:
            self.environment_changes = environment_changes(read_environment(writer.path))
            self._add_earlier_parts(writer, steps_done)

    def _add_earlier_parts(self, writer: RunWriter, steps_done: int) -> None:
        """Add the times of the parts before an interruption; a time that is not known for all of them becomes NaN."""
        earlier = writer.previous_result.get("missing_data")
        missing = [str(line) for line in earlier] if isinstance(earlier, list) else []
        compute, steps = writer.steps.total("compute_s"), writer.steps.total("step_s")
        if [int(row["step"]) for row in writer.steps.rows] != list(range(1, steps_done + 1)):
            missing.append(f"steps.csv has {len(writer.steps.rows)} of the {steps_done} steps before an interruption")
            compute = steps = math.nan
        elif writer.previous_number("global_steps") == steps_done:  # the result has the times of the slowest rank
            compute = max(compute, writer.previous_number("pure_compute_time") or 0.0)
            steps = max(steps, writer.previous_number("no_eval_time") or 0.0)
        raw, init, e2e = (writer.previous_number(name) for name in ("raw_train_time", "init_time", "e2e_time"))
        known_steps = writer.previous_number("global_steps")
        self.has_earlier_result = known_steps is not None and known_steps >= steps_done
        if steps_done == 0 and writer.evaluated_step < 0:  # nothing of an earlier part is kept
            raw, init, e2e, self.has_earlier_result = raw or 0.0, init or 0.0, e2e or 0.0, True
        elif not self.has_earlier_result:  # the result is written before each checkpoint: this one is an older copy
            missing.append(f"result.json of the {steps_done} steps before an interruption is missing")
            raw = init = e2e = None
        elif None in (raw, init, e2e) and not missing:
            missing.append(f"result.json lacks times of the {steps_done} steps before an interruption")
        # result.json may be up to a second older than the tables, so take at least the tables' times. `max` returns NaN
        # if its first argument is NaN, and ignores NaN as its second argument.
        evaluations = writer.evals.total("seconds", after_step=0)
        known_raw = max(math.nan if raw is None else raw, steps + evaluations)
        known_init = math.nan if init is None else init
        self._earlier = PhaseDurations(compute, steps, known_raw, known_init)
        self.earlier_e2e = max(math.nan if e2e is None else e2e, known_init + known_raw)
        self.missing_data = list(dict.fromkeys(missing))

    def e2e(self) -> float:
        """Return the seconds since the entry of `train`."""
        return time.monotonic() - self._start_time

    def durations(self) -> PhaseDurations:
        """Return the durations measured by this rank in this process."""
        seconds = self._timer.seconds()
        seconds.init = self.init_seconds
        return seconds

    def total_durations(self) -> PhaseDurations:
        """Return `durations` plus the durations before an interruption."""
        return self.durations() + self._earlier

    def samples(self, step: int) -> int:
        """Return the number of examples that all ranks computed in steps 1..step."""
        return self._sampler.samples_until(step)

    def samples_here(self, step: int) -> int:
        """Return the number of examples that all ranks computed in this process up to a step."""
        return self.samples(step) - self.samples(self._first_step)

    def peak_memory(self) -> Optional[float]:
        """Return this rank's peak memory in bytes; None if ranks share memory, where only the sum over ranks counts."""
        alone = self.config.topology.devices_per_node == 1 or not self._runtime.shares_memory
        return self._runtime.peak_memory(0) if alone else None

    def write(self, module: RecordModule, durable: bool = False) -> None:
        """Write result.json with the current metrics and a row of memory.csv; `durable` waits for the disk."""
        if self.writer is None:
            return
        seconds = self.durations()
        e2e = seconds.init + seconds.raw_train if seconds.raw_train else self.e2e()  # both at the same moment
        self.writer.write(self.row(module, seconds, e2e, self.peak_memory()), durable)
        warning = self.contention.sample_if_due() if self.contention is not None else None
        if warning:
            log.info(warning)
        in_use = self._runtime.memory_in_use(0)
        if in_use is not None:
            spent = round(self.e2e() + self.earlier_e2e, 3)
            self.writer.memory.add(step=module.steps_done, seconds=spent, gib=round(in_use / 2**30, 4))

    def row(self, module: RecordModule, seconds: PhaseDurations, e2e: float, peak: Optional[float]) -> Dict[str, Any]:
        """Build a result; its status is "running", because only the launcher decides how the run has ended.

        Args:
            module: gives the step counters.
            seconds: durations of this process; those before an interruption are added here.
            e2e: seconds since the entry of `train` of this process.
            peak: highest memory in use, bytes.
        """
        config, writer, step = self.config, self.writer, module.steps_done
        assert writer is not None
        measured, from_file = self._runtime.total_memory(0), None if self._is_slice() else config.hardware.memory_gib
        total = from_file if measured is None else measured / 2**30
        before = writer.previous_number("mem_actual_gib")
        used = None if peak is None or not self.has_earlier_result else peak / 2**30
        missing = self.missing_data
        if used is not None and total is not None and used > _ABOVE_TOTAL * total:
            missing = [*missing, f"memory in use, {used:.1f} GiB, is above the device's {total:.1f}"]
            used = before = None  # no value rather than a wrong one
        row = {
            "status": "running",
            **config_fields(config),
            "e2e_time": e2e + self.earlier_e2e,
            "earlier_e2e_time": self.earlier_e2e,
            **throughput_metrics(self.samples(step), seconds + self._earlier),
            "acc": self.accuracy if self.evaluated_step == step else None,
            "mem_actual_gib": used if used is None else max(used, before or 0.0),
            "mem_total_gib": total,
            "mem_total_source": None if total is None else "device" if measured is not None else "hardware file",
            **dict.fromkeys(("mfu", "mfu_flagperf", "tokens_per_s", "candidates_per_s", "rank_imbalance")),
            "converged": has_converged(self.accuracy, config.run),
            "num_trained_samples": self.samples(step),
            "global_steps": step,
            "skipped_steps": module.steps_skipped,
            "repeated_steps": writer.repeated_steps,
            "interruptions": writer.interruptions,
            "data_fingerprint": self._data_fingerprint,
            "runtime": self._runtime.name,
            "simulated": self._runtime.simulated,
            "computed_on_cpu": computes_on_cpu(config.hardware, self._runtime),
            "tf32": self._peak_name() == "tf32",
            "training_spans": self._training_spans(e2e),
            "missing_data": missing,
            "environment_changes": self.environment_changes,
            **self._contention_fields(),
        }
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }

    def finish(
        self,
        outcome: str,
        module: RecordModule,
        seconds: PhaseDurations,
        e2e: float,
        peak: Optional[float],
        counter: FlopCounter,
        node_spans: List[List[float]],
    ) -> Dict[str, Any]:
        """Write the final result (rank 0).

        Args:
            outcome: success, finished or interrupted: the status of the run, if all ranks exit as they should.
            module: gives the step counters.
            seconds: durations of the slowest rank in each phase.
            e2e: seconds from the entry of `train` to the end of training.
            peak: highest memory in use, bytes.
            counter: work of the steps.
            node_spans: training span of each node, in the time base of its devices.csv.
        """
        assert self.writer is not None
        assert self.contention is not None
        self.contention.sample()
        row = {**self.row(module, seconds, e2e, peak), "outcome": outcome}
        steps, work = module.steps_done, counter.totals_until(module.steps_done)
        peak = None if self._is_slice() else self.config.hardware.peak_tflops.get(self._peak_name())
        rates = compute_mfu(self.config, work, row["pure_compute_time"], row["p_core"], peak)
        if rates["mfu"] is not None and rates["mfu"] > 1:
            rates["mfu_above_one"], rates["mfu"] = rates["mfu"], None  # no value rather than a wrong one
        row["training_spans_by_node"] = self.spans_by_node(node_spans)
        row.update(rank_imbalance=counter.rank_imbalance(steps), model_flops=work.flops, **rates)
        has_all_steps = row["no_eval_time"] is not None
        row["step_s"] = timing.step_time_summary(self.writer.step_column("step_s")) if has_all_steps else None
        computed = self.writer.step_column("compute_s") if has_all_steps else []
        row["first_steps"] = timing.warmup_slowdown(computed, counter.flops_per_step(steps))
        self.writer.write(row)
        return row

    def _training_spans(self, e2e: float) -> Optional[List[List[float]]]:
        """Return the training spans of all parts of the run, in seconds since the entry of `train`; None if unknown."""
        assert self.writer is not None
        if not self.has_earlier_result or not math.isfinite(self.earlier_e2e):
            return None
        return [*(self.writer.previous_result.get("training_spans") or []), self.training_span(e2e)]

    def training_span(self, e2e: float) -> List[float]:
        """Return this node's training span in this part of the run, in the time base of its devices.csv."""
        begin = self.earlier_e2e + self.init_seconds
        return [begin, max(begin, e2e + self.earlier_e2e)]

    def spans_by_node(self, spans: List[List[float]]) -> Optional[List[List[List[float]]]]:
        """Return the training spans of each node, this part appended to the earlier ones; None if those are unknown."""
        assert self.writer is not None
        if not self.writer.resumes:
            return [[span] for span in spans]
        before = self.writer.previous_result.get("training_spans_by_node")
        if not self.has_earlier_result or not isinstance(before, list) or len(before) != len(spans):
            return None
        return [[*earlier, span] for earlier, span in zip(before, spans)]

    def _contention_fields(self) -> Dict[str, Any]:
        """Return the load of other processes; for a resumed run, the maximum over its parts."""
        assert self.writer is not None
        assert self.contention is not None
        load, processes = self.contention.external_cpu_load, self.contention.external_device_processes
        loads = [load, self.writer.previous_number("external_cpu_load")]
        counts = [processes, self.writer.previous_number("external_device_processes")]
        return {
            "external_cpu_load": max((x for x in loads if x is not None), default=None),
            "external_device_processes": max((int(x) for x in counts if x is not None), default=None),
        }

    def _is_slice(self) -> bool:
        return is_mig_slice(self._runtime.device_name(0))

    def _peak_name(self) -> str:
        return peak_key(self.config, self._runtime.has_tf32)
