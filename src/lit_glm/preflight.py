"""Pre-flight checks: machine and packages, runtime and devices, disk, data, checkpoint, memory."""

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import psutil
from packaging.requirements import Requirement

from lit_glm.check_result import CheckResult
from lit_glm.config.hydra_main import CONF_DIR
from lit_glm.config.schema import ModelConfig, TrainConfig
from lit_glm.data.memmap_dataset import SequenceLengths, summarise_hdf5
from lit_glm.errors import InputError, first_line
from lit_glm.hardware.device_monitor import format_reading, monitor_for
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.hardware.runtimes.selection import check_device_count, make_runtime, validate_devices
from lit_glm.isolated_process import call_isolated
from lit_glm.metrics import memory_estimate as estimates
from lit_glm.metrics.system_info import describe_machine
from lit_glm.runs.environment import installed_versions
from lit_glm.runs.run_folder import ensure_available

_GIB = 2**30
_CHECKPOINTS = 3  # two are kept while a third is written
_TRIED_MIB = 64
_SLOW_MIB_S = 50.0
_MAX_EXAMPLE_CHARS = 48  # characters of an example
_RENDEZVOUS_S, _OTHER_NODES_S = 6.0, 30.0
_READING_S = 10.0  # for one reading of the device monitor
_BUSY_PERCENT = 25.0
_VOCABULARY = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
"""SHA-256 of vocab.txt of google-bert/bert-large-uncased: 30,522 word pieces."""
_QUESTIONS = {"train": 100_730, "eval": 10_000}
"""Questions of ReCoRD (Zhang et al. 2018, table 2); training has one example per distinct answer, so at least these."""


def _existing_parent(path: Path) -> Path:
    """Return the folder itself, or its nearest existing parent."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _format_size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"


def check_disk(config: TrainConfig, run_dir: Path) -> CheckResult:
    """Check that a run may begin there; compare the free space with the checkpoints, and measure the write speed."""
    if config.run.resume is None:
        ensure_available(run_dir, config.run.overwrite)
    folder = _existing_parent(run_dir)
    count = estimates.count_parameters(config.model)
    checkpoint_bytes = count * (2 + 12 if config.precision.name == "fp16" else 12)
    needed, free = _CHECKPOINTS * checkpoint_bytes, shutil.disk_usage(str(folder)).free
    message = f"{folder}: {_format_size(free)} free, checkpoints take up to {_format_size(needed)}"
    if free < needed:
        return CheckResult("", "fail", message, "free disk space, or give hydra.run.dir= on another disk")
    try:
        with tempfile.NamedTemporaryFile(dir=str(folder), prefix=".lit_glm-doctor-") as file:
            block = os.urandom(2**20)
            start = time.perf_counter()
            for _ in range(_TRIED_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = _TRIED_MIB / (time.perf_counter() - start)
    except OSError as error:
        return CheckResult("", "fail", f"{message}; cannot be written ({error})", "give hydra.run.dir= on another disk")
    message += f", written at {speed:.0f} MiB/s: {checkpoint_bytes / 2**20 / speed:.0f} s per checkpoint"
    if speed < _SLOW_MIB_S:
        return CheckResult("", "warn", message, "a larger run.checkpoint_interval_steps saves time")
    return CheckResult("", "ok", message)


def _make_decoder(config: TrainConfig) -> Callable[[Any], str]:
    """Return a function that decodes token ids to text, or to numbers if there is no vocabulary."""
    vocab_file = config.data.vocab_file
    pieces: List[str] = []
    if vocab_file is not None:
        from lit_glm.data.cloze import WordPieceTokenizer

        WordPieceTokenizer(vocab_file)  # raises if it is invalid
        pieces = Path(vocab_file).read_text(encoding="utf-8").split("\n")
    elif config.data.synthetic is not None:
        from lit_glm.data.synthetic import synthetic_vocabulary

        pieces = synthetic_vocabulary()

    def decode(ids: Any) -> str:
        words = [pieces[i] if i < len(pieces) and pieces else str(i) for i in ids]
        text = " ".join(words).replace(" ##", "")
        return text if len(text) <= _MAX_EXAMPLE_CHARS else text[: _MAX_EXAMPLE_CHARS - 3] + "..."

    return decode


def check_data(config: TrainConfig, key: str) -> CheckResult:
    """Check that an HDF5 file fits the configuration, and show its counts and its first and last example."""
    path = Path(getattr(config.data, key))
    step = f"{config.global_batch} examples of a step (bs={config.bs}, topology={config.topology.name})"
    if config.data.synthetic is not None and not path.exists():
        if key == "train_file" and config.global_batch > config.data.synthetic.num_train:
            raise InputError(f"data.synthetic.num_train={config.data.synthetic.num_train}: fewer than the {step}")
        return CheckResult("", "ok", f"{path}: does not exist yet, train generates it on first use")
    decode, model = _make_decoder(config), config.model
    summary = call_isolated(summarise_hdf5, path, key == "eval_file")
    if summary["max_token_id"] >= model.vocab_size:
        raise InputError(
            f"{path}: token id {summary['max_token_id']} is beyond model.vocab_size={model.vocab_size}; "
            "model=glm_small, glm_base and glm_large have BERT's vocabulary (30592)"
        )
    if summary["max_tokens"] > min(config.data.max_seq_length, model.max_sequence_length):
        raise InputError(
            f"{path}: {summary['max_tokens']} tokens in a sequence, more than "
            f"data.max_seq_length={config.data.max_seq_length} or model.max_sequence_length={model.max_sequence_length}"
        )
    if key == "train_file" and config.global_batch > summary["examples"]:
        raise InputError(f"{path}: {summary['examples']} examples, fewer than the {step}")
    counts = f"{summary['examples']} examples, {summary['candidates']} candidates"
    shown = [
        f'{which} "{decode(context)}" with {count} candidates: {" | ".join(map(decode, candidates))}'
        for which, context, count, candidates in summary["first_and_last"]
    ]
    return CheckResult("", "ok", f"{path}: {counts}, at most {summary['max_tokens']} tokens; {'; '.join(shown)}")


def check_checkpoint(config: TrainConfig) -> CheckResult:
    """Compare names and shapes of the initial weights with the model's."""
    path = config.model.init_checkpoint
    if path is None:
        if config.model.name == "glm_tiny":
            return CheckResult("", "skip", "none: glm_tiny learns from scratch")
        return CheckResult("", "warn", "none: the weights are random", "model.init_checkpoint=blocklm-large-blank")
    from lit_glm.model.checkpoint import fit_to_model, meta_state_dict, read_weights

    weights = read_weights(Path(path))
    count = sum(weight.numel() for weight in weights.values())
    kinds = ", ".join(sorted({str(weight.dtype).replace("torch.", "") for weight in weights.values()}))
    messages = fit_to_model(weights, meta_state_dict(config.model), path)
    return CheckResult(
        "", "ok", "; ".join([f"{path}: {len(weights)} tensors, {count} values in {kinds}: all fit", *messages])
    )


def check_memory(config: TrainConfig, runtime: Optional[Runtime]) -> CheckResult:
    """Estimate the peak memory of a training step from the sequence lengths of the file."""
    path = Path(config.data.train_file)
    if config.data.synthetic is not None and not path.exists():
        return CheckResult("", "skip", "not estimated: the data does not exist yet")
    check = estimates.check_memory(config, SequenceLengths.from_hdf5(path), runtime)
    message, *advice = estimates.memory_message(config, check).split("\n")
    status = "fail" if advice else "warn" if check.available_bytes is None else "ok"
    return CheckResult("", status, message.replace("memory: ", ""), "; ".join(advice).replace("memory: ", ""))


def check_runtime(config: TrainConfig, env_messages: List[str]) -> CheckResult:
    """Create the runtime.

    Args:
        config: configuration of the run.
        env_messages: messages about variables of the hardware file that the environment sets already.
    """
    runtime = make_runtime(config.hardware, config.topology)
    version = f", driver {runtime.driver_version()}" if runtime.has_driver else ""
    message = f"{runtime.name} for {config.hardware.name}{version}"
    if runtime.simulated:
        return CheckResult(
            "", "warn", f"{message}: simulated on the CPU", "no measurement is that of the device", artifact=runtime
        )
    if env_messages:
        return CheckResult("", "warn", message, "; ".join(env_messages), artifact=runtime)
    return CheckResult("", "ok", message, artifact=runtime)


def check_devices(config: TrainConfig, runtime: Runtime) -> CheckResult:
    """Compare the devices with topology and hardware file."""
    unable = runtime.multi_node_unsupported_reason(config.topology.num_nodes)
    if unable is not None:
        raise InputError(f"topology={config.topology.name}: {unable}")
    check_device_count(runtime, config.topology)
    devices = config.topology.devices_per_node
    hints = validate_devices(config.hardware, runtime, devices, CONF_DIR / "hardware")
    names: List[str] = []
    for index in range(devices):
        total = runtime.total_memory(index)
        size = "memory unknown" if total is None else f"{total / 2**30:.1f} GiB"
        names.append(f"{runtime.device_name(index) or config.hardware.product_name} ({size})")
    hints += _try_monitor(config)
    kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    message = f"{runtime.device_count()} devices visible, {devices} required per node: {kinds}"
    return CheckResult("", "warn" if hints else "ok", message, "; ".join(hints))


def _try_monitor(config: TrainConfig) -> List[str]:
    """Take a reading of the devices' monitor; return what is wrong with it."""
    monitor = monitor_for(config.hardware)
    if monitor is None:
        return []
    has_devices = monitor.visible_devices_variable is not None  # many CPUs report no power, which is no fault
    problems = [f"the device monitor takes more than {_READING_S:g} s for a reading: no power, no energy"]

    def read() -> None:
        try:
            readings = list(monitor.read(None))
            rows = [format_reading(0.0, 0, reading) for reading in readings]
            problems[:] = [] if rows else ["the device monitor gives no readings: power and energy will be unknown"]
            if rows and has_devices and any(reading.power_w is None for reading in readings):
                problems[:] = ["the device monitor reads no power of some devices: energy will be unknown"]
        except Exception as error:  # a user's monitor
            kind = type(error).__name__
            problems[:] = [f"the device monitor raises {kind} ({first_line(error)}): no power, no energy"]

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(_READING_S)
    return list(problems)


def check_precision(config: TrainConfig, runtime: Runtime) -> CheckResult:
    """Check the precision with a small matrix product."""
    from lit_glm.hardware.precision import make_precision

    plugin = make_precision(config, runtime)
    dtype = str(plugin.computes_in).replace("torch.", "")  # type: ignore[attr-defined]
    message = f"{config.precision.name}: matrix products are computed in {dtype}"
    hint = runtime.precision_hint(config.precision.name)
    return CheckResult("", "warn" if hint else "ok", message, hint)


def check_rendezvous_port(config: TrainConfig, runtime: Runtime) -> CheckResult:
    """Check that the rendezvous port is available."""
    from lit_glm.launch.rendezvous import check_port, resolve_node

    if config.topology.world_size == 1:
        given = os.environ.get("MASTER_PORT", "")
        if given.isdigit():
            try:
                check_port(int(given))
            except InputError as error:
                return CheckResult("", "warn", str(error), "a single device needs none")
        return CheckResult("", "skip", "single device: no rendezvous")
    node = resolve_node(config.topology, config.hardware.runtime == "simulated")
    port = f":{node.port}" if node.port else " (a free port, chosen for each job; MASTER_PORT sets it)"
    return CheckResult("", "ok", f"node {node.rank} of {config.topology.num_nodes}, {node.address}{port}")


def check_collectives(config: TrainConfig, runtime: Runtime) -> CheckResult:
    """Start all ranks of this node and run the collectives over all ranks of the topology."""
    if config.topology.world_size == 1:
        return CheckResult("", "skip", "single device: no collectives")
    from lit_glm.launch.worker import run_on_all_ranks
    from lit_glm.verification.collectives_check import COLLECTIVES_MODULE

    limit_s = _OTHER_NODES_S if config.topology.num_nodes > 1 else _RENDEZVOUS_S
    result = run_on_all_ranks(config, COLLECTIVES_MODULE, limit_s)
    if result is None:
        return CheckResult("", "ok", "collectives with the other nodes passed; node 0 prints the timing")
    speed = result["mib"] / 1024 / result["seconds"]
    timing = f"{result['mib']} MiB in {1000 * result['seconds']:.1f} ms ({speed:.2f} GiB/s per rank)"
    return CheckResult(
        "",
        "ok",
        f"{result['ranks']} ranks over {result['backend']}: all-reduce, broadcast and all-gather correct; "
        f"all-reduce of {timing}, latency {1e6 * result['latency_s']:.0f} us",
    )


def check_host() -> CheckResult:
    """Describe this machine, and check whether other processes are using its CPUs."""
    busy = psutil.cpu_percent(interval=0.5)
    free = psutil.virtual_memory().available / 2**30
    message = f"{describe_machine()}; {free:.1f} GiB of memory free, CPUs {busy:.0f} % busy"
    if busy > _BUSY_PERCENT:
        return CheckResult("", "warn", message, "other processes use the CPUs: measurements would not be comparable")
    return CheckResult("", "ok", message)


def tested_versions() -> "tuple[str, Dict[str, str]]":
    """Return the name and content of the constraints file that is tested with this Python version."""
    name = "seed.txt" if sys.version_info < (3, 9) else "current.txt"
    text = (CONF_DIR.parent / "constraints" / name).read_text(encoding="utf-8")
    return name, dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def check_packages() -> CheckResult:
    """Compare the installed packages with the project's requirements and with the tested versions."""
    name, tested = tested_versions()
    try:
        needs = [Requirement(text) for text in metadata.requires("lit-glm") or []]
    except metadata.PackageNotFoundError:
        return CheckResult("", "warn", "lit-glm is not installed as a package", "pip install -e . in its checkout")
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    versions = installed_versions(need.name for need in needs)
    wrong = [f"{need.name} is missing" for need in needs if need.name not in versions]
    untested: List[str] = []
    for need in (need for need in needs if need.name in versions):
        version = versions[need.name]
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} is not {need.specifier}")
        elif version.split("+")[0] != tested.get(need.name, version):
            untested.append(f"{need.name} {version} (tested: {tested[need.name]})")
    python = f"Python {platform.python_version()}"
    if wrong:
        return CheckResult("", "fail", f"{python}: {', '.join(wrong)}", f"pip install -c constraints/{name} -e .")
    if untested:
        return CheckResult("", "warn", f"{python}: {', '.join(untested)}", f"other measurements are made with {name}")
    installed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return CheckResult("", "ok", f"{python}, {installed}: as in constraints/{name}")


def check_vocabulary(file: Path) -> Tuple[bool, str]:
    """Return whether a vocabulary is that of bert-large-uncased, and a message."""
    content = file.read_bytes()
    same = hashlib.sha256(content).hexdigest() == _VOCABULARY
    pieces = content.count(b"\n")
    return same, f"vocabulary {'is' if same else f'of {pieces} lines is not'} bert-large-uncased's"


def _compare_num_examples(kind: str, path: Path) -> Tuple[bool, str]:
    count, known = len(SequenceLengths.from_hdf5(path)), _QUESTIONS[kind]
    same = count == known if kind == "eval" else known <= count < 2 * known
    message = "as in ReCoRD" if same else f"not as in ReCoRD, which has {known:,} questions"
    return same, f"{count:,} {'training' if kind == 'train' else 'evaluation'} examples: {message}"


def _compare_num_weights(path: Path) -> Tuple[bool, str]:
    from lit_glm.model.checkpoint import read_weights

    known = estimates.count_parameters(ModelConfig())
    count = sum(weight.numel() for weight in read_weights(path).values())
    same = count == known
    return same, f"weights of {count:,} values: {'as many as' if same else 'not'} blocklm-large-blank's {known:,}"


def check_provenance(config: TrainConfig) -> CheckResult:
    """Compare vocabulary, data and initial weights with the published files; one result for all that exist."""
    files: List[Tuple[Optional[str], Callable[[Path], Tuple[bool, str]]]] = [(config.data.vocab_file, check_vocabulary)]
    if config.data.synthetic is None:
        files.append((config.data.train_file, partial(_compare_num_examples, "train")))
        files.append((config.data.eval_file, partial(_compare_num_examples, "eval")))
    files.append((config.model.init_checkpoint, _compare_num_weights))
    comparisons: List[Tuple[bool, str]] = []
    for file, compare in files:
        if file is not None and Path(file).exists():
            with suppress(InputError, OSError):  # another check reports a file that cannot be read
                comparisons.append(compare(Path(file)))
    if not comparisons:
        return CheckResult("", "skip", "no files to compare with the published ones (sources: docs/data.md)")
    message = "; ".join(text for _, text in comparisons)
    if all(same for same, _ in comparisons):
        return CheckResult("", "ok", message)
    return CheckResult("", "warn", message, "sources of the published files: docs/data.md")
