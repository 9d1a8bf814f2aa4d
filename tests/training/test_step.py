"""The step's own rules: skipped steps, accumulation, parameter groups."""

import json
import math
import signal
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from conftest import GOLDEN, GOLDEN_RUN, lit_glm_here, rows
from lit_glm.compat import dispatch_mode
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from lit_glm.data.datamodule import evaluation_batches
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.glm import GLM
from lit_glm.training import module as module_file
from lit_glm.training.evaluation import ExactMatch, em_and_f1, evaluate, normalise_answer
from lit_glm.training.module import RecordModule
from lit_glm.training.optimizer import (
    clip_gradients,
    fused_unavailable_reason,
    make_optimizer,
    parameter_groups,
)
from lit_glm.verification.operator_check import operator_name


def run(tmp_path: Path, *overrides: str) -> Path:
    folder = tmp_path / "run"
    assert lit_glm_here("train", *GOLDEN_RUN, *overrides, f"hydra.run.dir={folder}") == 0
    return folder


def test_a_loss_that_is_not_finite_skips_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: List[int] = []
    real = module_file.candidate_loss

    def sometimes_infinite(table: Any) -> Any:
        calls.append(1)
        loss = real(table)
        return loss * float("inf") if len(calls) == 3 else loss

    monkeypatch.setattr(module_file, "candidate_loss", sometimes_infinite)
    folder = run(tmp_path, "run.max_steps=5")
    steps = rows(folder / "steps.csv")
    assert [row["step"] for row in steps] == ["1", "2", "3", "4", "5"]
    assert math.isinf(float(steps[2]["loss"]))
    assert (steps[2]["lr"], steps[2]["grad_norm"]) == ("", "")
    # The schedule did not move in step 3: step 4 uses the rate that step 3 would have used.
    assert float(steps[3]["lr"]) == pytest.approx(1e-3 * 2 / 2.2)
    result = json.loads((folder / "result.json").read_text())
    assert (result["skipped_steps"], result["global_steps"], result["num_trained_samples"]) == (1, 5, 20)


def test_accumulation_updates_every_nth_step(tmp_path: Path) -> None:
    steps = rows(run(tmp_path, "optimizer.gradient_accumulation_steps=2", "run.max_steps=8", "bs=2") / "steps.csv")
    rates = [float(row["lr"]) for row in steps]
    assert rates[0] == rates[1] == 0.0
    assert rates[2] == rates[3] > 0
    assert rates[4] == rates[5] != rates[2]


@pytest.mark.process
@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param(
            "fp16",
            marks=[
                pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.12 has no fp16 on processors"),
                pytest.mark.slow,
            ],
        ),
    ],
)
@pytest.mark.parametrize("stop_after", [4, 5])
def test_accumulated_gradients_survive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, stop_after: int
) -> None:
    """Windows of two: the loss of step 4, the last of its window, is not finite; step 5 opens the next window."""
    how = ["optimizer.gradient_accumulation_steps=2", "run.max_steps=8", "bs=2", f"precision={precision}"]
    how += ["run.evaluate=false", "run.checkpoint_interval_steps=100", "optimizer.lr_decay_iters=100"]
    calls: List[int] = []
    real, stops = module_file.candidate_loss, [0]

    def loss_of_step(table: Any) -> Any:
        calls.append(1)
        if len(calls) == stops[0]:
            signal.raise_signal(signal.SIGTERM)
        return real(table) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(module_file, "candidate_loss", loss_of_step)
    unbroken = tmp_path / "unbroken"
    assert lit_glm_here("train", *GOLDEN_RUN, *how, f"hydra.run.dir={unbroken}") == 0
    calls.clear()
    stops[0] = stop_after
    folder = tmp_path / "run"
    assert lit_glm_here("train", *GOLDEN_RUN, *how, f"hydra.run.dir={folder}") == 128 + signal.SIGTERM
    assert [int(row["step"]) for row in rows(folder / "steps.csv")][-1] == stop_after
    assert lit_glm_here("train", *GOLDEN_RUN, *how, f"run.resume={folder}") == 0
    columns = ("step", "loss", "lr", "grad_norm", "loss_scale")
    told = [[[row[name] for name in columns] for row in rows(place / "steps.csv")] for place in (unbroken, folder)]
    assert told[0] == told[1]
    # As published: the gradient of step 3 is part of the update after step 6.
    assert told[0][3][2] == ""
    assert told[0][5][2] != ""


def test_parameter_groups_are_the_published_ones() -> None:
    stats = json.loads((GOLDEN / "stats.json").read_text())["optimizer"]
    groups = parameter_groups(GLM(ModelConfig("test", 24, 64, 4, 100, 16)), 0.1)
    for group, name in zip(groups, ("decayed", "not_decayed")):
        assert len(group["params"]) == stats[name]["tensors"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.12 has no fused update")
def test_incorrect_fused_optimizer_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert fused_unavailable_reason(device) is None
    assert make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig()).defaults["fused"]

    def forgets_decay(operator: Any, args: Any, kwargs: Any) -> Any:
        fused = operator_name(operator) == "_fused_adamw_"
        return operator(*args, **{**kwargs, "weight_decay": 0.0} if fused else kwargs)

    with dispatch_mode(forgets_decay):
        assert ", the default implementation " in str(fused_unavailable_reason(device))
        assert not make_optimizer(torch.nn.Linear(2, 2), OptimizerConfig()).defaults["fused"]


@pytest.mark.parametrize("highest", [1.0, 1e9])
def test_gradient_norm_of_many_elements_is_accurate(highest: float) -> None:
    """As large as the word embedding of a small model: torch's own norm is 8e-5 too low here."""
    weights = [torch.nn.Parameter(torch.empty(size)) for size in ((30592, 128), (128,))]
    for number, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    before = [weight.grad.clone() for weight in weights if weight.grad is not None]
    exact = torch.cat([gradient.double().flatten() for gradient in before]).norm()
    norm = clip_gradients(list(weights), highest)
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)
    factor = min(1.0, highest / (float(exact) + 1e-6))
    for weight, gradient in zip(weights, before):
        torch.testing.assert_close(weight.grad, gradient * factor, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("score", [-torch.inf, torch.nan])
def test_no_candidate_is_chosen_without_a_score_above_padding(score: float) -> None:
    config = validate_config(compose_config("train", GOLDEN_RUN), TrainConfig)
    split = open_dataset(config.data.eval_file, True, None)

    class Overflow(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, batch: Any) -> torch.Tensor:
            table = torch.full(batch.score_shape, score)
            table[:, -1] = -1e4  # as padding, in the batch of the most candidates one of them
            return table

    accuracy, chosen = evaluate(Overflow(), evaluation_batches(split, config), CPURuntime())
    assert accuracy is not None
    assert -1 in {choice for _, choice in chosen}


@pytest.mark.parametrize("scoring", ["shared_context", "published"])
def test_of_candidates_with_the_same_tokens_the_first_is_chosen(scoring: str, tmp_path: Path) -> None:
    """The vocabulary is uncased: Royal Navy and Royal navy are one, whatever the last bit of their scores says."""
    vocab = GOLDEN / "bert-large-uncased-vocab.txt"
    arguments = [f"data.raw_dir={GOLDEN / 'record_jsonl'}", f"data.vocab_file={vocab}", f"data.out_dir={tmp_path}"]
    assert lit_glm_here("prepare", *arguments, "data.num_workers=0") == 0
    overrides = [f"data.out_dir={tmp_path}", f"scoring={scoring}", "eval_bs=3"]
    config = validate_config(compose_config("train", overrides), TrainConfig)
    split = open_dataset(config.data.eval_file, True, None)
    lines = (tmp_path / "eval_hdf5" / "eval_examples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    texts = [[text.lower() for text in json.loads(line)["candidates"]] for line in lines]

    repeated = [[word in own[:slot] for slot, word in enumerate(own)] for own in texts]

    class LastBit(torch.nn.Module):
        """Scores a candidate whose tokens came before a little higher than all others."""

        device = torch.device("cpu")

        def forward(self, batch: Any) -> torch.Tensor:
            table = torch.full(batch.score_shape, -1e9)
            for row, index in zip(table, batch.indices):
                row[: len(repeated[index])] = torch.tensor(repeated[index]).float()
            return table

    scores: Dict[int, List[float]] = {}
    _, chosen = evaluate(LastBit(), evaluation_batches(split, config), CPURuntime(), scores=scores)
    for index, choice in chosen:
        own = texts[index]
        assert choice == (own.index(own[repeated[index].index(True)]) if any(repeated[index]) else 0)
        assert scores[index] == [0.0] * len(own)
    assert any(map(any, repeated))


def test_exact_match_counts_examples() -> None:
    metric = ExactMatch()
    metric.update([0, 2, 1], [(0,), (1, 2), (0, 3)])
    metric.update([3], [(3,)])
    assert float(metric.compute()) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("The White House", ["white house."], 1.0, 1.0),
        ("White House", ["House of Lords"], 0.0, 0.4),
        ("Paris", ["London", "paris"], 1.0, 1.0),
        ("Paris", ["London"], 0.0, 0.0),
    ],
)
def test_official_scores(prediction: str, answers: List[str], em: float, f1: float) -> None:
    assert em_and_f1(prediction, answers) == pytest.approx((em, f1))


def test_normalisation() -> None:
    assert normalise_answer(" The  U.S. - an  Answer!") == "us answer"


def test_skipped_step_count_is_restored_on_resume(tmp_path: Path) -> None:
    config = validate_config(compose_config("train", ["experiment=debug"]), TrainConfig)
    module = RecordModule(build_glm(config.model)[0], config, CPURuntime())
    module.on_load_checkpoint({"lit_glm": {"steps_done": 9, "steps_skipped": 3}})
    assert (module.steps_done, module.steps_skipped) == (9, 3)
