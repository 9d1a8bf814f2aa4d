"""Both scorings give the same scores on any batch; the ways of attending are equal, gradients too."""

import tempfile
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_glm.config.schema import ModelConfig
from lit_glm.data.cloze import encode_questions
from lit_glm.data.collate import build_padding_index, collate_packed, collate_padded, pad_packed
from lit_glm.data.h5sparse import SparseWriter
from lit_glm.data.memmap_dataset import MemmapDataset, build_cache
from lit_glm.data.superglue_jsonl import Question
from lit_glm.errors import InputError
from lit_glm.model.attention import DotProductAttention, PaddedAttention, PerGroupAttention, check_attention_available
from lit_glm.model.glm import GLM
from lit_glm.model.runtime_ops import RuntimeOps
from lit_glm.model.scoring import EVAL_MASK, TRAIN_MASK, candidate_loss, candidate_scores

LIMIT = 48


class LetterTokenizer:
    """A tokenizer for tests: every letter a token."""

    eos, cls, mask, sop, eop = 0, 1, 2, 3, 4

    def encode(self, text: str) -> List[int]:
        return [5 + ord(char) % 40 for char in text]


def make_split(questions: List[Question], tmp_path: Path) -> MemmapDataset:
    encoded = encode_questions(questions, LetterTokenizer(), LIMIT)  # type: ignore[arg-type]
    assert not encoded.too_long
    writer = SparseWriter(tmp_path / "some.hdf5", LIMIT)
    writer.add(encoded.columns, encoded.separators, encoded.counts, encoded.right)
    writer.close()
    cache = Path(tempfile.mkdtemp(dir=tmp_path))
    build_cache(tmp_path / "some.hdf5", True, cache)  # in this process: one for each of many files takes long
    return MemmapDataset(cache, tmp_path / "some.hdf5")


def question(passage: str, before: str, after: str, candidates: List[str]) -> Question:
    return Question(1, "g", 1, passage, before, after, candidates, candidates[:1], [0])


words = st.text("abcdefgh", min_size=1, max_size=7)
questions = st.builds(
    question,
    passage=st.text("abcdefgh", min_size=0, max_size=60).filter(lambda text: not 0 < len(text) < 8),
    before=st.text("abc", max_size=6),
    after=st.text("abc", max_size=6),
    candidates=st.lists(words, min_size=1, max_size=6),
)


def fits(entry: Question) -> bool:
    cut = 1 + len(entry.passage) + len(entry.before) + 1 + len(entry.after) + 1 + 8 - LIMIT
    return cut <= len(entry.passage)


def model(gelu: str = "tanh") -> GLM:
    torch.manual_seed(1)
    return GLM(ModelConfig("test", 2, 32, 4, 64, LIMIT, 0.0, 0.0, gelu, init_std=0.2))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(questions.filter(fits), min_size=1, max_size=4))
@pytest.mark.slow
def test_both_scorings_give_the_same_scores(batch: List[Question], tmp_path: Path) -> None:
    split, glm = make_split(batch, tmp_path), model()
    indices = list(range(len(batch)))
    for empty in (TRAIN_MASK, EVAL_MASK):
        flat = candidate_scores(glm, collate_packed(split, indices), empty)
        published = candidate_scores(glm, collate_padded(split, indices, LIMIT), empty, slice_size=2)
        assert flat.shape == published.shape
        torch.testing.assert_close(flat, published, atol=1e-4, rtol=0)


SPECIAL = {
    "contexts that differ": question("abcdefgh" * 6, "a", "b", ["a", "abcd", "abcdefg", "hgf", "b"]),
    "one candidate": question("abcdef", "ab", "", ["a"]),
    "equal candidates": question("abcdef", "", "c", ["abc", "abc", "abc"]),
    "longest context": question("h" * (LIMIT - 5), "", "", ["a", "b"]),
    "no passage left": question("abcdefgh", "a" * 20, "b" * 17, ["abcdefg"]),
}


@pytest.mark.parametrize("case", sorted(SPECIAL))
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_special_batches_with_gradients(case: str, gelu: str, tmp_path: Path) -> None:
    split, glm = make_split([SPECIAL[case], SPECIAL["one candidate"]], tmp_path), model(gelu)
    gradients: List[Any] = []
    for batch in (collate_packed(split, [0, 1]), collate_padded(split, [0, 1], LIMIT)):
        glm.zero_grad()
        table = candidate_scores(glm, batch, TRAIN_MASK)
        (table * (table > TRAIN_MASK)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in glm.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        if "query_key_value.bias" not in name:
            torch.testing.assert_close(gradient, gradients[1][name], atol=2e-3, rtol=1e-4, msg=name)


def test_contexts_that_differ_make_groups(tmp_path: Path) -> None:
    batch = collate_packed(make_split([SPECIAL["contexts that differ"]], tmp_path), [0])
    assert len(batch.context_lengths) > 1
    assert sum(batch.context_lengths) + sum(batch.candidate_rows) == len(batch.tokens)


FUSED = hasattr(torch.nn.functional, "scaled_dot_product_attention")
KERNELS = ["auto", "matmul"] + ["fused"] * FUSED
CONTEXTS, ROWS = [5, 9, 1], [4, 2, 6]
OWNER = [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]


def make_attention_layout(kind: Any, kernel: str = "auto", device: str = "cpu") -> Any:
    if kind is PaddedAttention:
        return kind.from_index(
            build_padding_index(np.array(CONTEXTS), np.array(ROWS), np.array(OWNER)).to(device),
            DotProductAttention(kernel),
        )
    return kind(CONTEXTS, ROWS, torch.tensor(OWNER, device=device), DotProductAttention(kernel))


def outputs_and_gradients(plans: List[Any], qkv: torch.Tensor, candidates_only: bool) -> "tuple[List[Any], List[Any]]":
    outputs, gradients = [], []
    for plan in plans:
        x = qkv.clone().requires_grad_()
        out = plan(x, 4, 0.0, candidates_only)
        (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
        outputs.append(out)
        gradients.append(x.grad)
    return outputs, gradients


@pytest.mark.parametrize("candidates_only", [False, True])
def test_attention_layouts_and_kernels_agree(candidates_only: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(27, 3 * 16)
    plans = [make_attention_layout(kind, kernel) for kind in (PerGroupAttention, PaddedAttention) for kernel in KERNELS]
    outputs, gradients = outputs_and_gradients(plans, qkv, candidates_only)
    for out, gradient in zip(outputs[1:], gradients[1:]):
        torch.testing.assert_close(outputs[0], out, atol=1e-5, rtol=0)
        torch.testing.assert_close(gradients[0], gradient, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card here")
@pytest.mark.parametrize("candidates_only", [False, True])
def test_attention_layouts_agree_on_cuda(candidates_only: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(27, 3 * 64).cuda()
    plans = [make_attention_layout(kind, device="cuda") for kind in (PerGroupAttention, PaddedAttention)]
    outputs, gradients = outputs_and_gradients(plans, qkv, candidates_only)
    for out, gradient in zip(outputs[1:], gradients[1:]):
        torch.testing.assert_close(outputs[0], out, atol=1e-4, rtol=0)
        torch.testing.assert_close(gradients[0], gradient, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_padded_sequences_by_every_kernel(kernel: str) -> None:
    torch.manual_seed(0)
    separators, qkv = torch.tensor([3, 7, 1]), torch.randn(3 * 8, 3 * 16)
    plans = [PaddedAttention.from_sequences(separators, 8, DotProductAttention(name)) for name in ("auto", kernel)]
    outputs, gradients = outputs_and_gradients(plans, qkv, False)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_chunked_matmul_attention_matches_unchunked(dropout: float) -> None:
    torch.manual_seed(0)
    qkv, found = torch.randn(5 * 8, 3 * 16), []
    one_by_one = lambda like, p: (torch.rand(like.shape) >= p, 1.0 / (1.0 - p))  # noqa: E731 (parts draw as the whole)
    for scores in (2**20, 2 * 4 * 8 * 8, 1):
        attend = DotProductAttention("matmul", RuntimeOps(sample_zeros=one_by_one, max_scores_at_once=scores))
        plan = PaddedAttention.from_sequences(torch.tensor([3, 7, 1, 8, 2]), 8, attend)
        x = qkv.clone().requires_grad_()
        torch.manual_seed(1)
        out = plan(x, 4, dropout, False)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out.detach(), x.grad))
    for out, gradient in found[1:]:
        torch.testing.assert_close(out, found[0][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=0)


def test_unavailable_attention_kernel_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    check_attention_available("auto")
    check_attention_available("matmul")
    monkeypatch.setattr("lit_glm.model.attention.has_fused_attention", lambda: False)
    with pytest.raises(InputError, match="fused: not available in torch"):
        check_attention_available("fused")


@pytest.mark.parametrize("scoring", ["flat", "padded"])
def test_activation_checkpointing_changes_nothing(scoring: str, tmp_path: Path) -> None:
    from lit_glm.hardware.runtimes.cpu import CPURuntime

    split = make_split([SPECIAL["contexts that differ"]], tmp_path)
    batch = collate_packed(split, [0]) if scoring == "flat" else collate_padded(split, [0], LIMIT)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        shape = ModelConfig("test", 2, 32, 4, 64, LIMIT, 0.1, 0.1, init_std=0.2, activation_checkpointing=recompute)
        glm = GLM(shape, CPURuntime().model_ops()).train()
        torch.manual_seed(2)
        candidate_loss(candidate_scores(glm, batch, TRAIN_MASK)).backward()
        gradients.append([p.grad for p in glm.parameters()])
    for plain, recomputed in zip(*gradients):
        np.testing.assert_array_equal(plain, recomputed)


@given(batch=st.lists(questions.filter(fits), min_size=1, max_size=4), pad_to=st.sampled_from([8, 16, 48]))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_padding_to_recurring_sizes_changes_no_score_and_no_gradient(
    batch: List[Question], pad_to: int, tmp_path: Path
) -> None:
    split, glm, found = make_split(batch, tmp_path), model(), []
    plain = collate_packed(split, list(range(len(batch))))
    for one in (plain, pad_packed(plain, pad_to)):
        glm.zero_grad()
        table = candidate_scores(glm, one, TRAIN_MASK)
        candidate_loss(table).backward()
        found.append((table, {name: p.grad.clone() for name, p in glm.named_parameters() if p.grad is not None}))
    (table, gradients), (padded, padded_gradients) = found
    C = table.shape[1]
    torch.testing.assert_close(padded[:, :C], table, atol=1e-5, rtol=1e-5)
    assert bool((padded[:, C:] == TRAIN_MASK).all())
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_padded_batches_have_few_distinct_shapes(tmp_path: Path) -> None:
    """What a runtime that compiles for each shape would compile in 200 steps."""
    draw = np.random.Generator(np.random.PCG64(0)).integers
    entries = [question("h" * int(draw(12, LIMIT - 16)), "a", "b", ["ab"] * int(draw(2, 30))) for _ in range(200 * 4)]
    split, shapes = make_split(entries, tmp_path), set()
    for first in range(0, len(entries), 4):
        padded = pad_packed(collate_packed(split, range(first, first + 4)), 16)
        shapes.add((len(padded.tokens), len(padded.targets), len(padded.slot), padded.padding_index.gather.shape))
    assert len(shapes) <= 10


def test_many_candidates_add_no_groups(tmp_path: Path) -> None:
    split = make_split([question("h" * 30, "a", "b", ["ab"] * 150), question("h" * 30, "a", "b", ["ab"] * 3)], tmp_path)
    plain = collate_packed(split, [0, 1])
    padded = pad_packed(plain, 16)
    assert len(padded.context_lengths) == len(plain.context_lengths) == 2
    assert padded.num_candidates == 256
