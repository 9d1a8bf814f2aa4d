"""One rank of one job: build, train, conclude."""

import signal
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from lit_glm.data.sequence_lengths import Lengths
from lit_glm.errors import RunError
from lit_glm.hardware import object_collectives
from lit_glm.hardware.oom import is_shortage
from lit_glm.launch.components import Built, Place, build, place_of
from lit_glm.launch.heartbeat import Heartbeat
from lit_glm.launch.signals import Interrupted, Signals, Stops
from lit_glm.metrics import memory_estimate
from lit_glm.metrics.flops import WorkCounter, peak_name
from lit_glm.metrics.loggers import finish
from lit_glm.metrics.timing import slowest
from lit_glm.runs.job_spec import Job
from lit_glm.runs.result import how_it_ended, table


def run_rank(job: Job, run_dir: Path, beat: Optional[Heartbeat] = None) -> Dict[str, Any]:
    """Run this process's part of a job.

    Args:
        job: what to do.
        run_dir: the run folder.
        beat: this rank's sign of life; None: one in the run folder.

    Returns:
        The result (rank 0), else an empty dict.

    Raises:
        InputError, RunError: what the user should read.
        Interrupted: after a signal; what was done is saved.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = Signals() if in_main_thread else None
    stops = Stops(signals) if signals is not None else None
    place = place_of(job, run_dir)
    try:
        beat = beat or Heartbeat(run_dir, place.rank)
        built = _build(place, beat, stops)
        _train(place, built, signals)
        beat.answer()  # Lightning's teardown sets all signal handlers that Python knows of
        result = _conclude(place, built)
        if built.recorder.interrupted:
            raise Interrupted((signals.received if signals else None) or signal.SIGTERM)
        return result
    finally:
        if signals is not None and stops is not None:
            stops.allow()
            signals.restore()


def _build(place: Place, beat: Heartbeat, stops: Optional[Stops]) -> Built:
    try:
        return build(place, beat, stops)
    except Exception as error:
        if not is_shortage(error):
            raise
        said = (
            f"out of memory before the first step, while model and data were made ({str(error).splitlines()[0][:200]})"
        )
        raise RunError(f"{said}; take a smaller model, or a machine with more memory", "out of memory") from error


def _train(place: Place, built: Built, signals: Optional[Signals]) -> None:
    """Train to the end; what there was not enough memory for is said as that."""
    if signals is not None:
        signals.module = built.module
        built.module.stop_requested = signals.received is not None
    resume_from = str(built.resume_from) if built.resume_from else None
    try:
        built.trainer.fit(built.module, datamodule=built.data, ckpt_path=resume_from)
    except Exception as error:
        if not is_shortage(error):
            raise
        lengths = Lengths.of(built.split)
        said = memory_estimate.ran_out(place.config, lengths, built.runtime, place.local_rank, built.recorder.doing)
        raise RunError(said, summary="out of memory") from error
    finally:
        if signals is not None:
            signals.module = None


def _conclude(place: Place, built: Built) -> Dict[str, Any]:
    """Put together what all ranks have measured, and write the result (rank 0)."""
    config, recorder, runtime = place.config, built.recorder, built.runtime
    assert recorder.ended is not None
    seconds, e2e = recorder.ended
    per_rank: List[Any] = [(seconds, runtime.peak_memory(place.local_rank))]
    if config.topology.world_size > 1:
        per_rank = object_collectives.gather(per_rank[0], runtime.device(place.local_rank))
    result: Dict[str, Any] = {}
    if place.rank == 0:
        steps = built.module.steps_done
        counter = WorkCounter(config, built.split, built.data.sampler(0, 0))
        result = recorder.account.finish(
            _status(built, config.run.target_accuracy),
            built.module,
            slowest([entry for entry, _ in per_rank]),
            e2e,
            _peak([peak for _, peak in per_rank if peak is not None], built, config.topology.devices_per_node),
            counter.until(steps),
            counter.of_each(steps),
            counter.imbalance(steps),
        )
        recorder.events.finished(result)
        place.say(how_it_ended(result, config, place.run_dir))
        print(table([result]), flush=True)  # the last thing on the screen
    finish(built.trainer.loggers if place.rank == 0 else [])
    if config.topology.world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if result.get("mfu_above_one"):
        name = peak_name(config, runtime.has_tf32)
        raise RunError(
            f"mfu is {result['mfu_above_one']:.2f}, above 100 %: hardware.peak_tflops.{name}="
            f"{config.hardware.peak_tflops[name]:g} is not the peak of this device; the run itself is "
            f"complete ({place.run_dir})"
        )
    return result


def _status(built: Built, target: float) -> str:
    if built.recorder.interrupted:
        return "interrupted"
    return "success" if (built.recorder.account.accuracy or 0.0) >= target else "finished"


def _peak(peaks: List[float], built: Built, per_node: int) -> Optional[float]:
    """Of the node with the most: the sum over ranks that share a memory, else the highest card."""
    nodes = [peaks[first : first + per_node] for first in range(0, len(peaks), per_node)]
    return max(sum(node) if built.runtime.shares_memory else max(node) for node in nodes) if nodes else None
