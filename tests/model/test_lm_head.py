"""The head's log-probabilities and their gradient against torch's log-softmax, in one slice and in many."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import GOLDEN_RUN, lit_glm_here, rows
from lit_glm.hardware.runtimes import cpu_ops
from lit_glm.model import lm_head
from lit_glm.model.lm_head import log_probabilities
from lit_glm.model.runtime_ops import RuntimeOps

T, D, V = 37, 8, 50


def parts(dtype: torch.dtype = torch.float32) -> "tuple[Tensor, Tensor, Tensor]":
    torch.manual_seed(0)
    h, embeddings = torch.randn(T, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_()
    return h, embeddings, torch.randint(0, V, (T,))


def with_gradients(picked: Tensor, h: Tensor, embeddings: Tensor) -> Any:
    (picked * torch.linspace(-1, 2, T)).sum().backward()
    return picked.detach(), h.grad, embeddings.grad


@pytest.mark.parametrize("elements", [1, 3 * V, 10 * V, T * V - 1, T * V])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_log_probabilities_match_torch(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, embeddings, targets = parts(dtype)
    table = (h @ embeddings.t()).float()
    expected = with_gradients(table.log_softmax(1).gather(1, targets[:, None])[:, 0], h, embeddings)
    monkeypatch.setattr(lm_head, "_BLOCK", elements)
    ops = RuntimeOps(max_training_logits=2 * elements, max_read_logits=elements)
    h, embeddings, targets = parts(dtype)
    found = with_gradients(log_probabilities(h, embeddings, targets, ops), h, embeddings)
    with torch.no_grad():
        evaluated = log_probabilities(h, embeddings, targets, ops)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.02}
    for ours, torchs in zip((*found, evaluated), (*expected, expected[0])):
        torch.testing.assert_close(ours, torchs, **tolerance)
    assert found[0].dtype is torch.float32


def test_unchunked_log_probabilities_match_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    h, embeddings, targets = parts()
    found = with_gradients(log_probabilities(h, embeddings, targets), h, embeddings)
    h, embeddings, targets = parts()
    picked = (h @ embeddings.t()).log_softmax(1).gather(1, targets[:, None])[:, 0]
    for ours, torchs in zip(found, with_gradients(picked, h, embeddings)):
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


@pytest.mark.process
@pytest.mark.parametrize(
    ("precision", "scoring"),
    [
        ("fp32", "shared_context"),
        pytest.param("bf16", "shared_context", marks=pytest.mark.slow),
        ("fp32", "published"),
        pytest.param("bf16", "published", marks=pytest.mark.slow),
    ],
)
def test_training_with_chunked_lm_head_gives_same_losses(
    precision: str, scoring: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden vocabulary is small: without this, runs in tests would take the head in one block."""
    losses = []
    for elements in (2**30, 1000):
        monkeypatch.setattr(cpu_ops, "TRAINING_LOGITS", 2 * elements)
        monkeypatch.setattr(cpu_ops, "READ_LOGITS", elements)
        run = tmp_path / str(elements)
        more = [f"precision={precision}", f"scoring={scoring}", "run.max_steps=4", f"hydra.run.dir={run}"]
        assert lit_glm_here("train", *GOLDEN_RUN, *more) == 0
        losses.append([float(row["loss"]) for row in rows(run / "steps.csv")])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5 if precision == "fp32" else 0.02)


def test_second_backward_pass_of_lm_head_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    picked = log_probabilities(*parts()).sum()
    picked.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        picked.backward()
