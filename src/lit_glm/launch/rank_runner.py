"""Execution of one rank of a job: build, train, write the result."""

import signal
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from lit_glm.data.sequence_lengths import SequenceLengths
from lit_glm.errors import RunError
from lit_glm.hardware import object_collectives
from lit_glm.hardware.oom import is_oom_error
from lit_glm.launch.components import RankContext, TrainingComponents, build_components, rank_context_from_env
from lit_glm.launch.heartbeat import Heartbeat
from lit_glm.launch.signals import Interrupted, StopRequest
from lit_glm.metrics import memory_estimate
from lit_glm.metrics.flops import FlopCounter, peak_key
from lit_glm.metrics.loggers import close_loggers
from lit_glm.metrics.timing import slowest_rank
from lit_glm.runs.job_spec import JobSpec
from lit_glm.runs.result import final_summary, results_table


def run_rank(job: JobSpec, run_dir: Path, stop: StopRequest, beat: Optional[Heartbeat] = None) -> Dict[str, Any]:
    """Run this rank's part of a job.

    Args:
        job: the job.
        run_dir: the run folder.
        stop: handler of the stop signals of this process.
        beat: this rank's heartbeat; None: one in the run folder.

    Returns:
        The result on rank 0, else an empty dict.

    Raises:
        InputError, RunError: with a message for the user.
        Interrupted: after a stop signal; completed steps are saved.
    """
    place = rank_context_from_env(job, run_dir)
    built = _build_components(place, beat or Heartbeat(run_dir, place.rank))
    _fit(place, built, stop)
    result = _write_final_result(place, built)
    if built.recorder.interrupted:
        raise Interrupted(stop.received or signal.SIGTERM)
    return result


def _build_components(place: RankContext, beat: Heartbeat) -> TrainingComponents:
    try:
        return build_components(place, beat)
    except Exception as error:
        if not is_oom_error(error):
            raise
        said = f"out of memory while building model and data ({str(error).splitlines()[0][:200]})"
        raise RunError(f"{said}; use a smaller model, or a machine with more memory", "out of memory") from error


def _fit(place: RankContext, built: TrainingComponents, stop: StopRequest) -> None:
    """Train until the run ends; report a lack of memory as such."""
    stop.save_first(built.module)
    resume_from = str(built.resume_from) if built.resume_from else None
    try:
        built.trainer.fit(built.module, datamodule=built.data, ckpt_path=resume_from)
    except Exception as error:
        if not is_oom_error(error):
            raise
        lengths = SequenceLengths.from_dataset(built.split)
        said = memory_estimate.oom_message(
            place.config,
            lengths,
            built.runtime,
            place.local_rank,
            built.recorder.memory_base,
            built.recorder.current_activity,
        )
        raise RunError(said, summary="out of memory") from error


def _write_final_result(place: RankContext, built: TrainingComponents) -> Dict[str, Any]:
    """Gather the measurements of all ranks and write the result (rank 0)."""
    config, recorder, runtime = place.config, built.recorder, built.runtime
    assert recorder.final_durations is not None
    seconds, e2e = recorder.final_durations
    span = recorder.run_metrics.training_span(e2e)
    per_rank: List[Any] = [(seconds, runtime.peak_memory(place.local_rank), span)]
    if config.topology.world_size > 1:
        per_rank = object_collectives.all_gather_object(per_rank[0], runtime.device(place.local_rank))
    result: Dict[str, Any] = {}
    if place.rank == 0:
        steps = built.module.steps_done
        counter = FlopCounter(config, built.split, built.data.sampler(0, 0))
        result = recorder.run_metrics.finish(
            _final_status(built, config.run.target_accuracy),
            built.module,
            slowest_rank([entry for entry, _, _ in per_rank]),
            e2e,
            _peak_memory(
                [peak for _, peak, _ in per_rank if peak is not None], built, config.topology.devices_per_node
            ),
            counter.totals_until(steps),
            counter.flops_per_step(steps),
            counter.rank_imbalance(steps),
            [span for _, _, span in per_rank[:: config.topology.devices_per_node]],
        )
        recorder.events.finished(result)
        place.print_once(final_summary(result, config, place.run_dir))
        print(results_table([result]), flush=True)  # the last output of the run
    close_loggers(built.trainer.loggers if place.rank == 0 else [])
    if config.topology.world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if result.get("mfu_above_one"):
        name = peak_key(config, runtime.has_tf32)
        raise RunError(
            f"mfu is {result['mfu_above_one']:.2f}, above 100 %: hardware.peak_tflops.{name}="
            f"{config.hardware.peak_tflops[name]:g} is not the peak of this device; the run itself is "
            f"complete ({place.run_dir})"
        )
    return result


def _final_status(built: TrainingComponents, target: float) -> str:
    if built.recorder.interrupted:
        return "interrupted"
    return "success" if (built.recorder.run_metrics.accuracy or 0.0) >= target else "finished"


def _peak_memory(peaks: List[float], built: TrainingComponents, per_node: int) -> Optional[float]:
    """Return the peak of the node that uses most: the sum of ranks that share a memory, else the highest device."""
    nodes = [peaks[first : first + per_node] for first in range(0, len(peaks), per_node)]
    return max(sum(node) if built.runtime.shares_memory else max(node) for node in nodes) if nodes else None
