"""Check whether data, vocabulary and weights are the published files, as far as a file shows (docs/data.md)."""

import hashlib
from pathlib import Path
from typing import Callable, List, Optional, Tuple

from lit_glm.check_result import CheckResult
from lit_glm.config.schema import ModelConfig, TrainConfig
from lit_glm.errors import InputError

_VOCABULARY = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
"""SHA-256 of vocab.txt of google-bert/bert-large-uncased: 30,522 word pieces."""
_QUESTIONS = {"train": 100_730, "eval": 10_000}
"""Questions of ReCoRD (Zhang et al. 2018, table 2); training has one example per distinct answer, so at least these."""


def check_vocabulary(file: Path) -> Tuple[bool, str]:
    """Return whether a vocabulary is that of bert-large-uncased, and a message."""
    content = file.read_bytes()
    same = hashlib.sha256(content).hexdigest() == _VOCABULARY
    pieces = content.count(b"\n")
    return same, f"vocabulary {'is' if same else f'of {pieces} lines is not'} bert-large-uncased's"


def _compare_num_examples(path: Path, kind: str) -> Tuple[bool, str]:
    from lit_glm.data.sequence_lengths import SequenceLengths

    count, known = len(SequenceLengths.from_hdf5(path)), _QUESTIONS[kind]
    same = count == known if kind == "eval" else known <= count < 2 * known
    said = "as in ReCoRD" if same else f"not as in ReCoRD, which has {known:,} questions"
    return same, f"{count:,} {'training' if kind == 'train' else 'evaluation'} examples: {said}"


def _compare_num_weights(path: Path) -> Tuple[bool, str]:
    from lit_glm.metrics.memory_estimate import count_parameters
    from lit_glm.model.checkpoint import read_weights

    count, known = sum(weight.numel() for weight in read_weights(path).values()), count_parameters(ModelConfig())
    same = count == known
    return same, f"weights of {count:,} values: {'as many as' if same else 'not'} blocklm-large-blank's {known:,}"


def check_provenance(config: TrainConfig) -> CheckResult:
    """Check all files that exist, with one result for all of them."""
    found: List[Tuple[bool, str]] = []

    def compare(what: Callable[[], Tuple[bool, str]]) -> None:
        try:
            found.append(what())
        except InputError:
            pass  # another check reports a file that cannot be read

    vocab, weights = config.data.vocab_file, config.model.init_checkpoint
    if vocab is not None and Path(vocab).is_file():
        compare(lambda: check_vocabulary(Path(vocab)))
    if config.data.synthetic is None:
        for kind, name in (("train", config.data.train_file), ("eval", config.data.eval_file)):
            if Path(name).is_file():
                compare(lambda name=name, kind=kind: _compare_num_examples(Path(name), kind))  # type: ignore[misc]
    if weights is not None and Path(weights).exists():
        compare(lambda: _compare_num_weights(Path(weights)))
    if not found:
        return CheckResult("", "skip", "no files to compare with the published ones (sources: docs/data.md)")
    other: Optional[str] = None if all(same for same, _ in found) else "sources of the published files: docs/data.md"
    said = "; ".join(text for _, text in found)
    return CheckResult("", "ok" if other is None else "warn", said, other or "")
