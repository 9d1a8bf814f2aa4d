"""Execution of one rank of a job: build model, data, callbacks and trainer; train; write the result."""

import logging
import os
import signal
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lit_glm.compat import has_fused_adamw, keep_own_signals
from lit_glm.config.command_line import suggest_command
from lit_glm.config.hydra_main import CONF_DIR
from lit_glm.config.schema import TrainConfig
from lit_glm.config.tuned_values import nearest_pair_hint
from lit_glm.data.datamodule import RecordDataModule
from lit_glm.data.memmap_dataset import SequenceLengths, join_fingerprints, open_datasets
from lit_glm.errors import InputError, RunError, first_line
from lit_glm.hardware import device_monitor, object_collectives
from lit_glm.hardware.accelerator import make_accelerator, make_strategy
from lit_glm.hardware.env import set_hardware_env
from lit_glm.hardware.precision import make_precision
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.selection import check_device_count, make_runtime, validate_devices
from lit_glm.launch.heartbeat import Heartbeat
from lit_glm.launch.process_group import assert_same_job_on_all_ranks, collective_timeout_s
from lit_glm.launch.signals import Interrupted, StopRequest
from lit_glm.metrics import memory_estimate
from lit_glm.metrics.benchmark_callback import BenchmarkCallback
from lit_glm.metrics.flops import FlopCounter, peak_key
from lit_glm.metrics.loggers import close_loggers, make_callbacks, make_loggers
from lit_glm.metrics.system_info import describe_system
from lit_glm.metrics.timing import slowest_rank
from lit_glm.model.attention import check_attention_available
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.compile import check_compile_available
from lit_glm.openmp import choose_num_threads
from lit_glm.process_utils import check_open_files_limit, is_oom_error
from lit_glm.runs import checkpoints, environment
from lit_glm.runs.environment import environment_changes, read_environment, write_environment
from lit_glm.runs.job_spec import JobSpec, config_hash
from lit_glm.runs.result import read_result
from lit_glm.training.evaluation import has_converged
from lit_glm.training.module import AtomicCheckpointIO, RecordModule
from lit_glm.training.optimizer import fused_unavailable_reason

log = logging.getLogger(__name__)


@dataclass
class RankContext:
    """Job, run folder and rank of this process."""

    job: JobSpec
    run_dir: Path
    rank: int
    local_rank: int

    @property
    def config(self) -> TrainConfig:
        """Configuration of the job."""
        return self.job.config

    def print_once(self, text: str) -> None:
        """Print a text on rank 0 only."""
        if self.rank == 0:
            for line in text.split("\n"):
                log.info(line)


@dataclass
class TrainingComponents:
    """Data, module, callbacks and trainer of one rank."""

    module: RecordModule
    data: RecordDataModule
    benchmark: BenchmarkCallback
    trainer: pl.Trainer
    memory: memory_estimate.MemoryCheck
    resume_from: Optional[Path]


def build_components(context: RankContext, heartbeat: Callable[[], None]) -> TrainingComponents:
    """Build what a rank needs, and print what will run.

    Raises:
        InputError: if the configuration does not fit the machine, the data or the weights.
    """
    config = context.config
    _silence_third_party()
    check_open_files_limit(config.data.num_workers)
    heartbeat()
    runtime = _make_validated_runtime(context)
    resume_from, content = _find_resume_checkpoint(context, runtime)  # before anything in the folder changes
    strategy = make_strategy(runtime, config.topology, collective_timeout_s(config))
    precision = make_precision(config, runtime, context.local_rank)
    train_split, eval_split = open_datasets(config.data, config.model)
    fingerprint = join_fingerprints((train_split, eval_split))
    before = (read_result(context.run_dir) or {}).get("data_fingerprint") if resume_from is not None else None
    if before not in (None, fingerprint):
        raise InputError(
            f"run.resume={context.run_dir}: the run was started with other data (data_fingerprint {before} there, "
            f"{fingerprint} here): {config.data.train_file}, {config.data.eval_file}"
        )
    lengths = SequenceLengths.from_dataset(train_split)
    _set_num_threads(context, lengths)
    _announce_run(context, runtime)
    heartbeat()
    memory_base = runtime.memory_in_use(context.local_rank)
    memory = memory_estimate.check_memory(config, lengths, runtime, context.local_rank, memory_base)
    context.print_once(memory_estimate.memory_message(config, memory))
    module = _make_module(context, runtime, is_trained=resume_from is not None)
    data = RecordDataModule(config, train_split, lambda: module.steps_done, runtime.pins_memory, runtime.synchronize)
    benchmark = BenchmarkCallback(context.job, context.run_dir, runtime, data, eval_split, heartbeat, fingerprint)
    benchmark.memory_base = memory_base
    loggers = make_loggers(context.job, context.run_dir, checkpoints.checkpoint_step(resume_from))
    # The supervisor has set the rank's variables; inside a Slurm allocation Lightning would read Slurm's instead.
    environment = [] if "TORCHELASTIC_RUN_ID" in os.environ else [LightningEnvironment()]
    try:
        trainer = pl.Trainer(
            accelerator=make_accelerator(runtime, config.hardware.accelerator),
            strategy=strategy,
            devices=config.topology.devices_per_node,
            num_nodes=config.topology.num_nodes,
            plugins=[precision, AtomicCheckpointIO(content), *environment],
            callbacks=[benchmark, *make_callbacks(config)],
            logger=loggers or False,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(context.run_dir),
            detect_anomaly=False,
        )
    except MisconfigurationException as error:  # such as a callback that saves checkpoints or shows progress
        raise InputError(f"callbacks: refused by Lightning: {first_line(error)}") from error
    keep_own_signals(trainer)
    return TrainingComponents(module, data, benchmark, trainer, memory, resume_from)


def _make_validated_runtime(context: RankContext) -> Runtime:
    """Create the runtime and compare its devices with the hardware file."""
    config = context.config
    messages = set_hardware_env(config.hardware)
    runtime = make_runtime(config.hardware, config.topology)
    check_device_count(runtime, config.topology)
    messages += validate_devices(config.hardware, runtime, config.topology.devices_per_node, CONF_DIR / "hardware")
    if context.rank == 0:
        for line in messages:
            log.warning(line)
    return runtime


def _set_num_threads(context: RankContext, lengths: SequenceLengths) -> None:
    """Set the number of threads according to a step's work, or to that of the run's first part."""
    config = context.config
    published = config.scoring.name == "published"
    rows = lengths.candidates.mean() * config.data.max_seq_length if published else lengths.rows.mean()
    before = read_environment(context.run_dir).get("threads") if context.job.is_resume else None
    width, devices = config.model.hidden_size, config.topology.devices_per_node
    threads = choose_num_threads(config.bs * float(rows), width, devices, before if isinstance(before, int) else None)
    if threads is not None:
        torch.set_num_threads(threads)


def _announce_run(context: RankContext, runtime: Runtime) -> None:
    """Print what runs on which device, and write environment.json."""
    config = context.config
    node = context.rank // config.topology.devices_per_node
    runtime.attach_memory_monitor(context.local_rank, device_monitor.readings_file(context.run_dir, node))
    if context.rank > 0:
        return
    write_environment(context.run_dir, describe_system(config, runtime, context.job.command), context.job.is_resume)
    changes = environment_changes(read_environment(context.run_dir))
    if changes:
        context.print_once(f"not all parts of this run were measured on the same machine: {'; '.join(changes)}")
    prefix = "SIMULATED, not measured on the device: " if runtime.simulated else ""
    precision = config.precision.name
    if precision == "fp32" and runtime.has_tf32:
        precision += " (TF32 on)" if config.precision.tf32 else " (TF32 off)"
    published = (
        config.fix_hp_source
        if config.fix_hp_source != "none"
        else f"none published{nearest_pair_hint(config.hardware.name, config.topology.world_size)}"
    )
    context.print_once(
        f"{prefix}{config.model.name} on {config.hardware.name} {config.topology.name}, {precision}, {config.fix_hp}, "
        f"global batch {config.global_batch}, fix_hp values: {published}"
    )
    is_published = config.scoring.name == "published"
    context.print_once(
        f"scoring={config.scoring.name}: "
        + (
            "the published workload" + (", comparable with published rows" if not runtime.simulated else "")
            if is_published
            else "one forward pass per context; equal scores, but throughput is not comparable with published rows"
        )
    )
    context.print_once(f"run folder {context.run_dir}")
    if runtime.has_driver and not _is_verified(context):
        command = suggest_command(context.job.command, "verify", f"hardware={config.hardware.name}")
        context.print_once(f"this driver has not passed a verification in {config.precision.name} here; run: {command}")
    hint = runtime.precision_hint(config.precision.name)
    if hint:
        context.print_once(f"precision={config.precision.name}: {hint}")


def _is_verified(context: RankContext) -> bool:
    config, machine = context.config, read_environment(context.run_dir)
    places, driver, runtime = [context.run_dir, Path.cwd()], machine.get("driver"), machine.get("runtime")
    verification = environment.latest_verification(places, config.hardware.name, driver, config.precision.name, runtime)
    return verification is not None and bool(verification["passed"])


def _make_module(context: RankContext, runtime: Runtime, is_trained: bool) -> RecordModule:
    """Build the model; where a checkpoint of the run replaces its weights, without the initial ones."""
    config = context.config
    device = runtime.device(context.local_rank)
    check_attention_available(config.model.attention)
    if config.model.compile:
        check_compile_available(device)
    reason = fused_unavailable_reason(device) if has_fused_adamw() else None
    if reason:
        context.print_once(f"optimizer: torch's fused AdamW is unavailable here ({reason}); using the default")
    runtime.manual_seed(config.seed)
    model = replace(config.model, init_checkpoint=None) if is_trained else config.model
    glm, messages = build_glm(model, runtime.model_ops())
    for line in messages:
        context.print_once(f"{config.model.init_checkpoint}: {line}")
    module = RecordModule(glm, config, runtime)
    module.config_hash = config_hash(config)
    return module


def _find_resume_checkpoint(
    context: RankContext, runtime: Runtime
) -> "tuple[Optional[Path], Optional[dict[str, Any]]]":
    """Find the checkpoint to resume from and read it; all ranks must find the same one."""
    path, content = None, None
    if context.job.is_resume:
        path, content, skipped = checkpoints.latest_valid(context.run_dir, config_hash(context.config))
        if context.rank == 0:
            for line in skipped:
                log.warning(line)
        if path is None and skipped:  # starting again from step 0 would discard the contents of the folder
            raise InputError(
                f"run.resume={context.run_dir}: none of its {len(skipped)} checkpoints can be used (see above); "
                "restore one, or start a new run in another folder"
            )
        from_start = "from step 0: no checkpoint found"
        context.print_once(f"resuming {f'after step {checkpoints.checkpoint_step(path)}' if path else from_start}")
    if context.config.topology.world_size > 1:
        assert_same_job_on_all_ranks(
            config_hash(context.config), checkpoints.checkpoint_step(path), runtime.device(context.local_rank)
        )
    return path, content if path is not None else None


def _silence_third_party() -> None:
    """Silence hints of Lightning and torch: users of this project see only its own messages."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for module in ("pytorch_lightning", "lightning_fabric", "torch.jit", "torch.utils.data"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message=".*barrier\\(\\).*|.*pkg_resources.*|.*isinstance.treespec.*")


def run_rank(job: JobSpec, run_dir: Path, stop: StopRequest, heartbeat: Optional[Heartbeat] = None) -> None:
    """Run this rank's part of a job.

    Args:
        job: the job.
        run_dir: the run folder.
        stop: handler of the stop signals of this process.
        heartbeat: this rank's heartbeat; None: one in the run folder.

    Raises:
        InputError, RunError: with a message for the user.
        Interrupted: after a stop signal; completed steps are saved.
    """
    context = RankContext(job, run_dir, int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)))
    try:
        components = build_components(context, heartbeat or Heartbeat(run_dir, context.rank))
    except Exception as error:
        if not is_oom_error(error):
            raise
        message = f"out of memory while building model and data ({first_line(error)})"
        raise RunError(f"{message}; use a smaller model, or a machine with more memory", "out of memory") from error
    _fit(context, components, stop)
    received = _write_final_result(context, components, stop.received)
    if components.benchmark.interrupted:
        raise Interrupted(received or signal.SIGTERM)


def _fit(context: RankContext, components: TrainingComponents, stop: StopRequest) -> None:
    """Train until the run ends; convert out-of-memory errors to a `RunError` with the memory estimate."""
    stop.save_first(components.module)
    resume_from = str(components.resume_from) if components.resume_from else None
    try:
        components.trainer.fit(components.module, datamodule=components.data, ckpt_path=resume_from)
    except Exception as error:
        if not is_oom_error(error):
            raise
        doing = components.benchmark.current_activity
        message = memory_estimate.oom_message(
            context.config, components.memory, components.benchmark.runtime, context.local_rank, doing
        )
        raise RunError(message, summary="out of memory") from error


def _write_final_result(context: RankContext, components: TrainingComponents, received: Optional[int]) -> Optional[int]:
    """Gather the measurements of all ranks and write the result (rank 0); return the stop signal that any received."""
    config, benchmark, runtime = context.config, components.benchmark, components.benchmark.runtime
    assert benchmark.final_durations is not None
    seconds, e2e = benchmark.final_durations
    span = benchmark.run_metrics.training_span(e2e)
    per_rank: List[Any] = [(seconds, runtime.peak_memory(context.local_rank), span, received)]
    if config.topology.world_size > 1:
        per_rank = object_collectives.all_gather_object(per_rank[0], runtime.device(context.local_rank))
    durations, peaks, spans, signals = zip(*per_rank)
    result: Dict[str, Any] = {}
    if context.rank == 0:
        outcome = "success" if has_converged(benchmark.run_metrics.accuracy, config.run) else "finished"
        result = benchmark.run_metrics.finish(
            "interrupted" if benchmark.interrupted else outcome,
            components.module,
            slowest_rank(durations),
            e2e,
            _peak_memory([peak for peak in peaks if peak is not None], runtime, config.topology.devices_per_node),
            FlopCounter(config, components.data.split, components.data.sampler(0, 0)),
            list(spans[:: config.topology.devices_per_node]),
        )
        benchmark.events.finished(result)
    close_loggers(components.trainer.loggers if context.rank == 0 else [])
    if config.topology.world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if result.get("mfu_above_one"):
        name = peak_key(config, runtime.has_tf32)
        raise RunError(
            f"mfu is {result['mfu_above_one']:.2f}, above 1: hardware.peak_tflops.{name}="
            f"{config.hardware.peak_tflops[name]:g} is not the peak of this device; the run itself is "
            f"complete ({context.run_dir})"
        )
    return next(filter(None, signals), None)


def _peak_memory(peaks: List[float], runtime: Runtime, per_node: int) -> Optional[float]:
    """Return the peak of the node that uses most: the sum of ranks that share a memory, else the highest device."""
    nodes = [peaks[first : first + per_node] for first in range(0, len(peaks), per_node)]
    return max(sum(node) if runtime.shares_memory else max(node) for node in nodes) if nodes else None
