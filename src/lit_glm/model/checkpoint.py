"""Models with their first weights: from published checkpoints, safetensors, or checkpoints of runs; and export.

The published layout (THUDM/GLM) is a torch file with the weights under "module"; a folder holds it under
ITERATION/mp_rank_00_model_states.pt and names ITERATION in latest_checkpointed_iteration.txt. Only "module" is used.
"""

import glob
import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from lit_glm.compat import load_torch_file, meta_device
from lit_glm.config.schema import ModelConfig
from lit_glm.errors import InputError, first_line
from lit_glm.model.glm import GLM
from lit_glm.model.runtime_ops import TORCH_OPS, RuntimeOps

log = logging.getLogger(__name__)

_POSITION = "transformer.position_embeddings.weight"
_BLOCK_POSITION = "transformer.block_position_embeddings.weight"
_LATEST = "latest_checkpointed_iteration.txt"
_MAX_NAMES = 8  # names in a message
_MARK = "exported_by"
_EXPORTED = {_MARK: "lit_glm"}
"""Mark of an exported file; readers of the published layout take no notice of it."""


def load_checkpoint(glm: GLM, path: "str | Path") -> List[str]:
    """Load weights into a model, by the published rule.

    If the file has a block-position table, position tables that are shorter than the model's fill its first rows and
    the rest stays freshly initialised. Values are converted to the model's dtypes.

    Args:
        glm: freshly initialised model.
        path: a published file or folder, or a safetensors file.

    Returns:
        Messages about what was done besides copying.

    Raises:
        InputError: if the file is missing, damaged or unsafe, or a name or shape does not fit.
    """
    weights = read_weights(Path(path))
    messages = fit_to_model(weights, glm.state_dict(), path)
    glm.load_state_dict(weights)
    return messages


def fit_to_model(weights: Dict[str, Tensor], expected: Dict[str, Tensor], path: "str | Path") -> List[str]:
    """Extend position tables that are too short, and check that all names and shapes are the model's.

    Args:
        weights: weights of a file; changed in place.
        expected: weights of the model, freshly initialised; on the device "meta" only shapes are compared.
        path: path of the file, for messages.

    Returns:
        Messages about what was done.

    Raises:
        InputError: if a name or shape does not fit.
    """
    messages = []
    if _BLOCK_POSITION in weights:
        for name in (_POSITION, _BLOCK_POSITION):
            if name in weights and weights[name].dim() == 2 and len(weights[name]) < len(expected[name]):
                if weights[name].shape[1] != expected[name].shape[1]:
                    continue  # reported below, with all that does not fit
                rows = len(weights[name])
                extended = expected[name].clone()
                if not extended.is_meta:
                    extended[:rows] = weights[name].to(extended.dtype)
                weights[name] = extended
                messages.append(f"{name}: {rows} rows from the file, {len(extended) - rows} freshly initialised")
    wrong = [f"missing: {name} {list(expected[name].shape)}" for name in expected if name not in weights]
    wrong += [f"unexpected: {name} {list(weights[name].shape)}" for name in weights if name not in expected]
    wrong += [
        f"{name}: the file has {list(weights[name].shape)}, the model {list(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:12] + ([f"and {len(wrong) - 12} more"] if len(wrong) > 12 else []))
        raise InputError(
            f"model.init_checkpoint={path}: does not fit the model (model.num_layers, hidden_size, vocab_size, "
            f"max_sequence_length):\n  {shown}"
        )
    return messages


def read_weights(path: Path) -> Dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU; files of a model-parallel set are merged.

    Raises:
        InputError: if it cannot be read.
    """
    if not path.exists():
        raise InputError(f"model.init_checkpoint={path}: no such file or folder")
    if path.is_dir():
        path, *older = find_checkpoints_in(path)
        while older:  # of a run: a damaged one is skipped, as when it is resumed
            try:
                return _read_module(path)
            except InputError as error:
                log.warning(f"{error}; skipped")
                path = older.pop(0)
    if _is_safetensors(path):
        return _read_safetensors(path)
    parts = [_read_module(file) for file in _model_parallel_set(path)]
    return parts[0] if len(parts) == 1 else _merge_model_parallel(parts, path)


def save_published(weights: Dict[str, Tensor], path: Path, iteration: int) -> None:
    """Write weights in the published layout."""
    torch.save({"iteration": iteration, "module": weights, **_EXPORTED}, str(path))


def save_safetensors(weights: Dict[str, Tensor], path: Path) -> None:
    """Write weights as safetensors."""
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    _import_safetensors().save_file(contiguous, str(path), metadata=_EXPORTED)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file has that format: a header in JSON after its length in eight bytes, or that suffix."""
    with path.open("rb") as file:
        start = file.read(10)
    return path.suffix == ".safetensors" or start[8:] in (b'{"', b"{}")


def is_exported(path: Path) -> bool:
    """Return whether a file was written by `save_published` or `save_safetensors`; `export` may replace it."""
    try:
        if _is_safetensors(path):
            with _import_safetensors().safe_open(str(path), "pt") as file:
                return bool(_EXPORTED.items() <= (file.metadata() or {}).items())
        content = load_torch_file(path, mmap=True)
        return isinstance(content, dict) and content.get(_MARK) == _EXPORTED[_MARK]
    except Exception:  # not a file of that kind
        return False


def find_checkpoints_in(folder: Path) -> List[Path]:
    """Return the checkpoint of a published folder, or those of a run, the newest first.

    Raises:
        InputError: if it holds none.
    """
    latest = folder / _LATEST
    if not latest.is_file():
        direct = folder / "mp_rank_00_model_states.pt"
        of_run = sorted((folder / "checkpoints").glob("step-*.ckpt"))
        if direct.is_file() or of_run:
            return [direct] if direct.is_file() else of_run[::-1]
        raise InputError(
            f"model.init_checkpoint={folder}: contains no {_LATEST} (published) and no checkpoints/step-*.ckpt "
            "(of a run)"
        )
    iteration = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w.-]+", iteration) or iteration in (".", ".."):
        raise InputError(f"{latest}: names {iteration[:80]!r}, which is not a folder name")
    file = folder / iteration / "mp_rank_00_model_states.pt"
    if not file.is_file():
        raise InputError(f"{latest}: names {iteration!r}, but there is no {file}")
    return [file]


def _model_parallel_set(path: Path) -> List[Path]:
    """Return the file itself, or all of mp_rank_00, mp_rank_01, ... in its folder."""
    match = re.fullmatch(r"mp_rank_(\d\d)(.*)", path.name)
    if match is None:
        return [path]
    siblings = sorted(path.parent.glob(f"mp_rank_[0-9][0-9]{glob.escape(match.group(2))}"))
    for number, file in enumerate(siblings):
        if file.name != f"mp_rank_{number:02d}{match.group(2)}":
            raise InputError(f"{path.parent}: mp_rank_{number:02d}{match.group(2)} is missing from the set")
    return siblings


def _read_module(path: Path) -> Dict[str, Tensor]:
    """Read the weights of a torch file: under "module" as published, or of a run's checkpoint."""
    content = _load_torch_file(path)
    weights = content.get("module") if isinstance(content, dict) else None
    if isinstance(content, dict) and isinstance(content.get("lit_glm"), dict):
        weights = {name.replace("glm.", "", 1): tensor for name, tensor in content["state_dict"].items()}
    if not isinstance(weights, dict):
        raise InputError(f'{path}: has no weights under "module"; it contains {_describe_content(content)}')
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: module[{name!r}] is not a tensor but {type(tensor).__name__}")
    return dict(weights)


def _describe_content(content: Any) -> str:
    """List a few names in the content of a file."""
    if not isinstance(content, dict):
        return type(content).__name__
    names = [str(name)[:60] for name in list(content)[:_MAX_NAMES]]
    more = f" and {len(content) - _MAX_NAMES} more" if len(content) > _MAX_NAMES else ""
    bare = '; these are weights: save them as {"module": weights}' if _are_weights(content) else ""
    return f"{', '.join(names) or 'nothing'}{more}{bare}"


def _are_weights(content: Dict[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def find_damage(path: Path) -> Optional[str]:
    """Return the first part of a torch archive with a wrong checksum; None if all are right, or it has none.

    torch writes a CRC-32 for each tensor but does not check it when reading.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        return str(error)


def _load_torch_file(path: Path) -> Any:
    """Load a torch file without executing any of it.

    Raises:
        InputError: states what the file is instead, or what is wrong with it; never how to load it unsafely.
    """
    reason = describe_wrong_file(path)
    if reason is not None:
        raise InputError(f"{path}: {reason}")
    damage = find_damage(path)
    if damage is not None:
        raise InputError(f"{path}: is damaged ({damage}: wrong checksum); copy or download it again")
    try:
        return load_torch_file(path)
    except pickle.UnpicklingError as error:
        reference = re.search(r"(?:GLOBAL|global) `?([\w.]+)`?", str(error))
        if reference is None:
            raise InputError(f"{path}: is not a torch file, or damaged; copy or download it again") from error
        raise InputError(
            f"{path}: refused: it references {reference.group(1)}; a checkpoint may contain only tensors and plain "
            "values; nothing was executed"
        ) from error
    except Exception as error:  # a broken file fails in many ways inside torch
        state = "is not a torch file" if not zipfile.is_zipfile(path) else "is damaged"
        reason = first_line(error)
        reason = "not in its format" if "weights_only" in reason else reason  # torch suggests an unsafe load
        raise InputError(f"{path}: {state} or truncated ({reason})") from error


def _merge_model_parallel(parts: List[Dict[str, Tensor]], path: Path) -> Dict[str, Tensor]:
    """Merge weights that were split by THUDM's model parallelism.

    As in its change_mp.py: column-parallel weights (MLP up, word embedding) along rows, row-parallel ones (attention
    and MLP output) along columns, query_key_value block by block; replicated weights come from the first part.
    """
    merged: Dict[str, Tensor] = {}
    for name, first in parts[0].items():
        try:
            tensors = [part[name] for part in parts]
        except KeyError as error:
            raise InputError(f"{path}: tensor {name} is missing from some of the model-parallel files") from error
        try:
            if "query_key_value" in name:
                blocks = [tensor.chunk(3, dim=0) for tensor in tensors]
                merged[name] = torch.cat([block[kind] for kind in range(3) for block in blocks], dim=0)
            elif "dense_h_to_4h" in name or name == "word_embeddings.weight":
                merged[name] = torch.cat(tensors, dim=0)
            elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                merged[name] = torch.cat(tensors, dim=1)
            else:
                merged[name] = first
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise InputError(
                f"{path}: the model-parallel files are of different models: {name} has the shapes {shapes}"
            ) from error
    return merged


def _import_safetensors(error_at: Optional[Path] = None) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        location = f"{error_at}: " if error_at else ""
        raise InputError(f"{location}needs the package safetensors: pip install 'lit-glm[safetensors]'") from error
    return safetensors.torch


def _read_safetensors(path: Path) -> Dict[str, Tensor]:
    library = _import_safetensors(path)
    try:
        weights: Dict[str, Tensor] = library.load_file(str(path))
    except Exception as error:
        raise InputError(f"{path}: is not a complete safetensors file ({error})") from error
    return weights


_UNPACK = "unpack it (tar xf, unzip, ...) and use the extracted file or folder"
_MAGIC_BYTES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: git lfs pull, or download the file"),
    (b"BZh", f"is a bzip2 archive: {_UNPACK}"),
    (b"\x1f\x8b", f"is a gzip archive: {_UNPACK}"),
    (b"\xfd7zXZ\0", f"is an xz archive: {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {_UNPACK}"),
    (b"(\xb5/\xfd", f"is a zstd archive: {_UNPACK}"),
    (b"Rar!", f"is a rar archive: {_UNPACK}"),
    (b"\x89HDF", "is an HDF5 file: data goes to data.train_file or data.eval_file"),
)
_HTML_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_HEAD = 512
_TAR = slice(257, 262)


def describe_wrong_file(path: Path) -> Optional[str]:
    """Describe what a file is and what to do about it; None if it may be a torch file."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "is empty: copy or download it again"
    for start, reason in _MAGIC_BYTES:
        if head.startswith(start):
            return reason
    if head[_TAR] == b"ustar":
        return f"is a tar archive: {_UNPACK}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith(_HTML_STARTS):
        return "is a web page: the download gave an error or a login page; download it again, and compare the size"
    if text.startswith((b"{", b"[")):
        return "is a JSON file, not a weights file"
    if len(head) > 1 and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "is a text file, not a weights file"
    return None


def build_glm(config: ModelConfig, ops: RuntimeOps = TORCH_OPS) -> Tuple[GLM, List[str]]:
    """Build a model and load its checkpoint, if one is given.

    Returns:
        The model, and messages about what loading did besides copying.
    """
    glm = GLM(config, ops)
    messages = load_checkpoint(glm, config.init_checkpoint) if config.init_checkpoint else []
    return glm, messages


def meta_state_dict(config: ModelConfig) -> Dict[str, Tensor]:
    """Return names and shapes of the weights, without memory for their values where torch supports that."""
    with meta_device():
        return GLM(config).state_dict()
