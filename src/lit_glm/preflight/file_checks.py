"""Checks of disk, data, checkpoint and memory."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, Optional

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import TrainConfig
from lit_glm.data.hdf5_summary import summarise_hdf5
from lit_glm.data.sequence_lengths import SequenceLengths
from lit_glm.errors import InputError
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.isolated_process import call_isolated
from lit_glm.metrics import memory_estimate as estimates

_GIB = 2**30
_CHECKPOINTS = 3  # two are kept while a third is written
_TRIED_MIB = 64
_SLOW_MIB_S = 50.0
_SHOWN = 48


def _existing_parent(place: Path) -> Path:
    """Return the folder itself, or its nearest existing parent."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def _format_size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"


def check_disk(config: TrainConfig, place: Path) -> CheckResult:
    """Compare the free space with the size of the checkpoints, and measure the write speed."""
    folder = _existing_parent(place)
    count = estimates.count_parameters(config.model)
    one = count * (2 + 12 if config.precision.name == "fp16" else 12)
    needed, free = _CHECKPOINTS * one, shutil.disk_usage(str(folder)).free
    said = f"{folder}: {_format_size(free)} free, checkpoints take up to {_format_size(needed)}"
    if free < needed:
        return CheckResult("", "fail", said, "free disk space, or give hydra.run.dir= on another disk")
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
        return CheckResult("", "fail", f"{said}; cannot be written ({error})", "give hydra.run.dir= on another disk")
    said += f", written at {speed:.0f} MiB/s: {one / 2**20 / speed:.0f} s per checkpoint"
    if speed < _SLOW_MIB_S:
        return CheckResult("", "warn", said, "a larger run.checkpoint_interval_steps saves time")
    return CheckResult("", "ok", said)


def _make_decoder(config: TrainConfig) -> Callable[[Any], str]:
    """Return a function that decodes token ids to text, or to numbers if there is no vocabulary."""
    vocab_file = config.data.vocab_file
    pieces: List[str] = []
    if vocab_file is not None:
        from lit_glm.data.tokenizer import WordPieceTokenizer

        WordPieceTokenizer(vocab_file)  # raises if it is invalid
        pieces = Path(vocab_file).read_text(encoding="utf-8").split("\n")
    elif config.data.synthetic is not None:
        from lit_glm.data.synthetic import synthetic_vocabulary

        pieces = synthetic_vocabulary()

    def decode(ids: Any) -> str:
        words = [pieces[i] if i < len(pieces) and pieces else str(i) for i in ids]
        text = " ".join(words).replace(" ##", "")
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."

    return decode


def check_data(config: TrainConfig, key: str) -> CheckResult:
    """Check that an HDF5 file fits the configuration, and show its counts and its first and last example."""
    path = Path(getattr(config.data, key))
    if config.data.synthetic is not None and not path.exists():
        return CheckResult("", "ok", f"{path}: does not exist yet, train generates it on first use")
    decode, model = _make_decoder(config), config.model
    found = call_isolated(summarise_hdf5, path, key == "eval_file")
    if found["highest"] >= model.vocab_size:
        raise InputError(
            f"{path}: token id {found['highest']} is beyond model.vocab_size={model.vocab_size}; model=glm_small, "
            "glm_base and glm_large have BERT's vocabulary (30592)"
        )
    if found["tokens"] > min(config.data.max_seq_length, model.max_sequence_length):
        raise InputError(
            f"{path}: {found['tokens']} tokens in a sequence, more than "
            f"data.max_seq_length={config.data.max_seq_length} or model.max_sequence_length={model.max_sequence_length}"
        )
    if key == "train_file" and config.global_batch > found["examples"]:
        raise InputError(
            f"{path}: {found['examples']} examples, fewer than the {config.global_batch} of a step (bs={config.bs}, "
            f"topology={config.topology.name})"
        )
    counts = f"{found['examples']} examples, {found['candidates']} candidates, at most {found['tokens']} tokens"
    shown = [
        f'{which} "{decode(context)}" with {count} candidates: {" | ".join(map(decode, candidates))}'
        for which, context, count, candidates in found["ends"]
    ]
    return CheckResult("", "ok", f"{path}: {counts}; {'; '.join(shown)}")


def check_checkpoint(config: TrainConfig) -> CheckResult:
    """Compare names and shapes of the initial weights with the model's."""
    path = config.model.init_checkpoint
    if path is None:
        if config.model.name == "glm_tiny":
            return CheckResult("", "skip", "none: glm_tiny learns from scratch")
        return CheckResult("", "warn", "none: the weights are random", "model.init_checkpoint=blocklm-large-blank")
    from lit_glm.model.build import meta_state_dict
    from lit_glm.model.checkpoint import fit_to_model, read_weights

    weights = read_weights(Path(path))
    count = sum(weight.numel() for weight in weights.values())
    kinds = ", ".join(sorted({str(weight.dtype).replace("torch.", "") for weight in weights.values()}))
    done = fit_to_model(weights, meta_state_dict(config.model), path)
    return CheckResult(
        "", "ok", "; ".join([f"{path}: {len(weights)} tensors, {count} values in {kinds}: all fit", *done])
    )


def check_memory(config: TrainConfig, runtime: Optional[Runtime]) -> CheckResult:
    """Estimate the peak memory of a training step from the sequence lengths of the file."""
    path = Path(config.data.train_file)
    if config.data.synthetic is not None and not path.exists():
        return CheckResult("", "skip", "not estimated: the data does not exist yet")
    said, *advice = estimates.memory_message(config, SequenceLengths.from_hdf5(path), runtime).split("\n")
    unknown = runtime is None or runtime.total_memory(0) is None
    status = "fail" if advice else "warn" if unknown else "ok"
    return CheckResult("", status, said.replace("memory: ", ""), "; ".join(advice).replace("memory: ", ""))
