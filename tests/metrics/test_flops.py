"""Counted work: the formulas against torch's own counter, steps against the batches that are really computed."""

from typing import Any

import numpy as np
import pytest

from conftest import EVAL_FILE, GOLDEN_RUN, TRAIN_FILE
from lit_glm.config.hydra_main import checked, compose
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import flat_batch, padded_batch
from lit_glm.data.datamodule import RecordData
from lit_glm.data.memmap_dataset import CompactSplit, open_split
from lit_glm.metrics.flops import Work, WorkCounter, peak_name, published_flops, shared_context_flops, utilisation
from lit_glm.model.build import build_glm
from lit_glm.model.scoring import TRAIN_MASK, choice_loss, score_table


def configuration(*more: str) -> TrainConfig:
    return checked(
        compose("train", [*GOLDEN_RUN, "model.init_checkpoint=null", "data.cache_dir=null", *more]), TrainConfig
    )


@pytest.fixture(scope="module")
def split() -> CompactSplit:
    return open_split(TRAIN_FILE, False, None)


def counted(config: TrainConfig, batch: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    glm, _ = build_glm(config.model)  # with torch's own products, which the counter knows
    with flop_counter.FlopCounterMode(display=False) as counter:
        choice_loss(score_table(glm, batch, TRAIN_MASK)).backward()
    return float(counter.get_total_flops())


def test_shared_context_against_torchs_counter(split: CompactSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_glm.model.attention._SMALL_GROUP", 0)  # small groups are padded, which costs more
    config = configuration("model.attention=matmul")
    batch = flat_batch(split, list(range(6)))
    model = config.model
    formula = shared_context_flops(model, batch.context_lengths, batch.candidate_rows).sum()
    # The last layer's queries of the contexts are computed with its keys and values, though nobody needs them.
    unneeded = 6.0 * model.hidden_size**2 * sum(batch.context_lengths)
    assert counted(config, batch, monkeypatch) == pytest.approx(formula + unneeded, rel=1e-9)


def test_published_against_torchs_counter(split: CompactSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration("scoring=published", "model.attention=matmul", "model.activation_checkpointing=false")
    batch = padded_batch(split, [0, 1], 96)
    sequences = batch.table[0] * batch.table[1]
    assert counted(config, batch, monkeypatch) == pytest.approx(published_flops(config.model, sequences, 96), rel=1e-9)


@pytest.mark.parametrize("scoring", ["shared_context", "published"])
@pytest.mark.parametrize("topology", ["1x1", "1x4"])
def test_work_of_steps_is_that_of_their_batches(split: CompactSplit, scoring: str, topology: str) -> None:
    config = configuration(f"scoring={scoring}", f"topology={topology}", "bs=2")
    data = RecordData(config, split, lambda: 0, False, lambda: None)
    counter = WorkCounter(config, split, data.sampler(0, 0))
    ranks = config.topology.world_size
    streams = [iter(data.sampler(0, rank)) for rank in range(ranks)]
    flops = rows = candidates = 0.0
    for step in range(1, 26):  # more than an epoch of 1x4
        for stream in streams:
            share = next(stream)
            candidates += sum(int(np.diff(split.example_candidate_end)[index]) for index in share)
            if scoring == "published":
                batch = padded_batch(split, share, 96)
                sequences = batch.table[0] * batch.table[1]
                flops += float(published_flops(config.model, sequences, 96))
                rows += sequences * 96
            else:
                flat = flat_batch(split, share)
                flops += float(shared_context_flops(config.model, flat.context_lengths, flat.candidate_rows).sum())
                rows += len(flat.tokens)
        work = counter.until(step)
        assert (work.flops, work.rows, work.candidates) == pytest.approx((flops, rows, candidates))


def test_no_utilisation_without_a_peak() -> None:
    rates = utilisation(configuration(), Work(1e12, 1000, 10), 2.0, 5.0, "fp32")
    assert (rates["mfu"], rates["mfu_flagperf"]) == (None, None)
    assert (rates["tokens_per_s"], rates["candidates_per_s"]) == (500.0, 5.0)


def test_utilisation_by_hand() -> None:
    config = configuration("hardware=a100", "topology=1x2")
    rates = utilisation(config, Work(39e12, 1000, 10), 2.0, 10.0, peak_name(config, True))
    assert rates["mfu"] == pytest.approx(39e12 / 2 / (2 * 19.5e12))
    assert rates["mfu_flagperf"] == pytest.approx(6 * 0.33e9 * 512 * 10 / (2 * 19.5e12))
    rounded = configuration("hardware=a100", "precision.tf32=true")
    assert utilisation(rounded, Work(39e12), 2.0, 10.0, peak_name(rounded, True))["mfu"] == pytest.approx(
        39e12 / 2 / 156e12
    )


def test_tf32_that_a_chip_does_not_have_costs_no_figure() -> None:
    asked = "precision.tf32=true"
    assert peak_name(configuration("hardware=a100", asked), has_tf32=False) == "fp32"
    assert peak_name(configuration("hardware=bi_v100", asked), has_tf32=True) == "fp32"
    assert peak_name(configuration("hardware=cuda", asked), has_tf32=True) == "tf32"  # a card without a file of its own


def test_balancing_evens_out_the_ranks() -> None:
    eval_split = open_split(EVAL_FILE, True, None)
    found = {}
    for balance in ("true", "false"):
        config = configuration("topology=1x2", f"data.balance_ranks={balance}")
        data = RecordData(config, eval_split, lambda: 0, False, lambda: None)
        found[balance] = WorkCounter(config, eval_split, data.sampler(0, 0)).imbalance(20)
    assert 0 <= found["true"] < found["false"]
    config = configuration()
    one = RecordData(config, eval_split, lambda: 0, False, lambda: None)
    assert WorkCounter(config, eval_split, one.sampler(0, 0)).imbalance(20) is None
