"""Examples and weights that a verification computes with: generated, the same everywhere, in both layouts."""

import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import List

import torch

from lit_glm.config.schema import ModelConfig, TrainConfig
from lit_glm.data.batch import PackedBatch, PaddedBatch
from lit_glm.data.cloze import encode_questions
from lit_glm.data.collate import collate_packed, collate_padded
from lit_glm.data.h5sparse import SparseWriter
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.data.superglue_jsonl import Question
from lit_glm.model.build import build_glm
from lit_glm.model.glm import GLM

_SEED = 20231
_FIRST = 0x100  # characters stand for tokens, one each


class _CharacterTokenizer:
    """A tokenizer to which every character is a token."""

    eos, cls, mask, sop, eop = 0, 1, 2, 3, 4

    def __init__(self, vocab_size: int) -> None:
        self._size = vocab_size

    def encode(self, text: str) -> List[int]:
        return [5 + (ord(char) - _FIRST) % (self._size - 5) for char in text]


@dataclass
class VerifyFixture:
    """What is computed with."""

    model: ModelConfig
    flat: PackedBatch
    padded: PaddedBatch

    def fresh_model(self) -> GLM:
        """A float32 model on the processor; the same at every call."""
        torch.manual_seed(_SEED)
        return build_glm(self.model)[0]


def make_fixture(config: TrainConfig, examples: int = 2, candidates: int = 3) -> VerifyFixture:
    """Generate.

    Args:
        config: gives the shape; dropout is left out.
        examples: B.
        candidates: C.
    """
    model = replace(
        config.model, hidden_dropout=0.0, attention_dropout=0.0, init_checkpoint=None, activation_checkpointing=False
    )
    length = min(config.data.max_seq_length, model.max_sequence_length)
    draw = random.Random(_SEED)

    def text(count: int) -> str:
        return "".join(chr(_FIRST + draw.randrange(20000)) for _ in range(count))

    questions = []
    for number in range(examples):
        choices = [text(2 + number % 4) for _ in range(candidates)]  # of one length: a longer one is never chosen
        passage = text(int(length * (0.55 + 0.2 * number / max(1, examples - 1))))
        questions.append(Question(number, f"{number}", 1, passage, text(5), text(7), choices, choices[:1], [0]))
    encoded = encode_questions(questions, _CharacterTokenizer(model.vocab_size), length)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="lit_glm-verify-") as folder:
        writer = SparseWriter(Path(folder) / "some.hdf5", length)
        writer.add(encoded.columns, encoded.separators, encoded.counts, encoded.right)
        writer.close()
        split = open_dataset(Path(folder) / "some.hdf5", True, None)
        indices = list(range(examples))
        return VerifyFixture(model, collate_packed(split, indices), collate_padded(split, indices, length))
