"""One rank of one job, from its configuration to its result.

Under torchrun: `python -m lit_glm.jobs.worker SPEC_DIR RUN_DIR`. SPEC_DIR holds job.json and this node's signs of life;
on the first node it is the run folder.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from lit_glm.bench.result import COMPLETE, amend_result, table, write_json
from lit_glm.config.app import CONF
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.hardware.runtimes import check_cards, check_devices, make_runtime
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.variables import set_environment
from lit_glm.jobs.group import agree, collective_limit, joined
from lit_glm.jobs.heartbeat import Heartbeat
from lit_glm.jobs.interrupts import Interrupted, Signals
from lit_glm.jobs.spec import Job, identity
from lit_glm.orphans import die_with_parent

_FIRST_RANK_SPEAKS_S = 15.0


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
    try:
        return _run(job, run_dir, signals, beat or Heartbeat(run_dir, int(os.environ.get("RANK", 0))))
    finally:
        if signals is not None:
            signals.restore()


def _run(job: Job, run_dir: Path, signals: Optional[Signals], beat: Callable[[], None]) -> Dict[str, Any]:
    config = job.config
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kept = set_environment(config.hardware)
    _quiet()

    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.plugins.environments import LightningEnvironment

    from lit_glm.batches.compact import open_data
    from lit_glm.batches.datamodule import RecordData, evaluation_batches
    from lit_glm.bench import memory
    from lit_glm.bench.curves import Curves
    from lit_glm.bench.environment import describe
    from lit_glm.bench.figures import slowest
    from lit_glm.bench.recorder import Recorder
    from lit_glm.bench.run_folder import RunFolder
    from lit_glm.bench.work import WorkCounter, peak_name
    from lit_glm.hardware import exchange
    from lit_glm.hardware.accelerator import make_accelerator, make_strategy
    from lit_glm.hardware.precision import make_precision
    from lit_glm.jobs import checkpoints
    from lit_glm.model.attention import check_kernel
    from lit_glm.model.build import build_glm
    from lit_glm.training.loop import shorten
    from lit_glm.training.module import RecordModule
    from lit_glm.training.unprofiled import Unprofiled

    beat()
    runtime = make_runtime(config.hardware, config.topology)
    check_devices(runtime, config.topology)
    world_size = config.topology.world_size
    strategy = make_strategy(runtime, config.topology, collective_limit(config))
    precision = make_precision(config, runtime, local_rank)
    kept += check_cards(config.hardware, runtime, config.topology.devices_per_node, CONF / "hardware")
    runtime.watch_memory(local_rank)
    if rank == 0:
        for line in kept:
            print(f"lit_glm: {line}", file=sys.stderr)
        write_json(run_dir / "environment.json", describe(config, runtime, job.command))
        print(_opening(config, runtime, run_dir), flush=True)
        hint = runtime.precision_hint(config.precision.name)
        if hint:
            print(f"lit_glm: precision={config.precision.name}: {hint}", flush=True)
    beat()
    train_split, eval_split = open_data(config.data, config.model)
    if rank == 0:
        for line in memory.describe(config, memory.Lengths.of(train_split), runtime, local_rank).split("\n"):
            print(f"lit_glm: {line}", flush=True)

    check_kernel(config.model.attention, runtime.device(local_rank), training=True)
    runtime.manual_seed(config.seed)
    glm, done = build_glm(config.model, runtime.checkpoint())
    if rank == 0:
        for line in done:
            print(f"lit_glm: {config.model.init_checkpoint}: {line}")
    module = RecordModule(glm, config, runtime.manual_seed)
    data = RecordData(config, train_split, lambda: module.steps_done, runtime.pins_memory, runtime.synchronize)

    resume_from: Optional[Path] = None
    if job.resumes:
        resume_from, passed_over = checkpoints.newest_usable(run_dir, identity(config))
        if rank == 0:
            for line in passed_over:
                print(f"lit_glm: {line}", file=sys.stderr)
            where = (
                f"after step {int(resume_from.stem[5:])}" if resume_from else "from the start: there is no checkpoint"
            )
            print(f"lit_glm: the run goes on {where}", flush=True)

    if world_size > 1:
        agree(identity(config), int(resume_from.stem[5:]) if resume_from else 0, runtime.device(local_rank))

    def open_folder(steps_done: int) -> RunFolder:
        return RunFolder(run_dir, config, runtime, steps_done, job.resumes)

    def save(trainer: pl.Trainer, step: int) -> None:
        trainer.save_checkpoint(checkpoints.path_of(run_dir, step), weights_only=False)
        if trainer.is_global_zero:
            checkpoints.tidy(run_dir)

    module.identity = identity(config)
    recorder = Recorder(
        config,
        runtime,
        job.entry,
        open_folder,
        lambda rank, world: evaluation_batches(eval_split, config, rank, world),
        data.sampler(0, 0).epoch_of,
        save,
        beat,
        lambda: data.waited,
        (len(train_split), len(eval_split)),
    )
    trainer = pl.Trainer(
        accelerator=make_accelerator(runtime, config.hardware.accelerator),
        strategy=strategy,
        devices=config.topology.devices_per_node,
        num_nodes=config.topology.num_nodes,
        # One device needs no cluster; inside a Slurm allocation Lightning would look for one.
        plugins=[precision, checkpoints.AtomicCheckpointIO(), *([LightningEnvironment()] if world_size == 1 else [])],
        callbacks=[recorder, Curves(recorder), *_instantiate(config.callbacks, None)],
        logger=_instantiate(config.logger, run_dir) or False,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(run_dir),
        detect_anomaly=False,
        profiler=Unprofiled(),
    )
    # Signals are ours (Lightning ends with status 0 after one), and no collective a step for them.
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
    shorten(trainer)
    if signals is not None:
        signals.module = module
        module.stop_requested = signals.received is not None

    trainer.fit(module, datamodule=data, ckpt_path=str(resume_from) if resume_from else None)

    if signals is not None:
        signals.module = None
    seconds, e2e = recorder.seconds(), recorder.e2e()
    per_rank: List[Any] = [(seconds, runtime.peak_memory(local_rank))]
    if world_size > 1:
        per_rank = exchange.gather(per_rank[0], runtime.device(local_rank))
    peaks = [peak for _, peak in per_rank if peak is not None]
    result: Dict[str, Any] = {}
    if trainer.is_global_zero:
        if recorder.interrupted:
            status = "interrupted"
        else:
            status = "success" if (recorder.accuracy or 0.0) >= config.run.target_accuracy else "finished"
        nodes = [
            peaks[n : n + config.topology.devices_per_node]
            for n in range(0, len(peaks), config.topology.devices_per_node)
        ]
        peak = max(sum(node) if runtime.shares_memory else max(node) for node in nodes) if peaks else None
        steps = module.steps_done
        counter = WorkCounter(config, train_split, data.sampler(0, 0))
        result = recorder.finish(
            status,
            module,
            slowest([entry for entry, _ in per_rank]),
            e2e,
            peak,
            work=counter.until(steps),
            rank_imbalance=counter.imbalance(steps),
        )
        print(table([result]), flush=True)
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if result.get("mfu_above_one"):
        raise RunError(
            f"mfu is {result['mfu_above_one']:.2f}, above 100 %: hardware.peak_tflops.{peak_name(config)}="
            f"{config.hardware.peak_tflops[peak_name(config)]:g} is not the peak of this device; the run itself is "
            f"complete ({run_dir})"
        )
    if recorder.interrupted:
        raise Interrupted((signals.received if signals else None) or signal.SIGTERM)
    return result


def _opening(config: TrainConfig, runtime: Runtime, run_dir: Path) -> str:
    what = "SIMULATED, no figure of the chip: " if runtime.simulated else ""
    precision = config.precision.name
    if precision == "fp32" and runtime.has_tf32:
        precision += " (TF32 on)" if config.precision.tf32 else " (TF32 off)"
    return (
        f"lit_glm: {what}{config.model.name} on {config.hardware.name} {config.topology.name}, "
        f"{precision}, {config.fix_hp}, global batch {config.global_batch}, "
        f"values for the pair: {config.tuned_for}\n"
        f"lit_glm: scoring={config.scoring.name}"
        + (
            ": the published workload, comparable with published rows"
            if config.scoring.name == "published"
            else ": one pass a context; same scores as published, other speed (not comparable with published rows)"
        )
        + f"\nlit_glm: run folder {run_dir}"
    )


def _instantiate(entries: Dict[str, Any], run_dir: Optional[Path]) -> List[Any]:
    """Make the objects that a group of `_target_`s describes; loggers get the run folder as their place."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    made = []
    for name, entry in entries.items():
        place: Dict[str, Any] = {}
        if run_dir is not None and "MLFlow" in entry["_target_"]:
            place = {"tracking_uri": f"file:{run_dir}/mlruns"}
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones want a database server without it
        elif run_dir is not None:
            place = {"save_dir": str(run_dir)}
            if entry["_target_"].endswith("CSVLogger") and (run_dir / entry["name"] / "metrics.csv").exists():
                # Lightning's CSV logger cannot go on with a table: a run that goes on begins another beside it.
                parts = len(list((run_dir / entry["name"]).glob("**/metrics.csv")))
                entry = {**entry, "version": f"part{parts + 1}"}
        try:
            made.append(instantiate({**place, **entry}))
        except (InstantiationException, ImportError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(
                f"{'logger' if run_dir else 'callbacks'}.{name}: cannot be made ({reason}); "
                f"its package may be missing: pip install 'lit-glm[{name}]'"
            ) from error
    return made


def _quiet() -> None:
    """Lightning's hints are for its own users; ours read what this project prints."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for module in ("pytorch_lightning", "lightning_fabric", "torch.jit", "torch.utils.data"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message=".*barrier\\(\\).*|.*pkg_resources.*|.*isinstance.treespec.*")


def main(spec_dir: Path, run_dir: Path) -> int:
    """Run under torchrun: errors become messages and exit statuses."""
    die_with_parent()
    job = Job.read(spec_dir)
    beat = Heartbeat(spec_dir, int(os.environ["RANK"]))

    def work() -> None:
        with joined(job.config):
            beat()
            run_rank(job, run_dir, beat)

    return said(work)


def said(work: Callable[[], None]) -> int:
    """Do a rank's work; what goes wrong is said by this rank, once.

    Returns:
        The exit status.
    """
    rank = os.environ.get("RANK", "0")
    try:
        work()
    except Interrupted as stop:
        return stop.exit_status
    except (InputError, RunError) as error:
        if isinstance(error, InputError) and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_FIRST_RANK_SPEAKS_S)  # wrong input is wrong for all ranks: the first says it, its end ends all
        print(f"lit_glm: rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except BaseException:
        print(f"lit_glm: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


def fail(run_dir: Path, message: str) -> None:
    """Say in the result that the run failed, unless it ended well."""
    from lit_glm.bench.result import read_result

    result = read_result(run_dir)
    if result is not None and result.get("status") not in COMPLETE:
        amend_result(run_dir, status="failed", error=message)


def leave(status: int) -> None:
    """End this rank without the interpreter's teardown.

    After a failure a peer that is gone must not hold this process up; after a success threads of torch's collectives
    that are still joinable would abort it now and then.
    """
    if status == 0:
        atexit._run_exitfuncs()  # loggers finish their files there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
