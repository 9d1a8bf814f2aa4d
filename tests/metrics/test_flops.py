"""Counted work: the formulas against torch's own counter, steps against the batches that are really computed."""

from typing import Any, Optional

import numpy as np
import pytest

from conftest import EVAL_FILE, GOLDEN_RUN, TRAIN_FILE
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import collate_packed, collate_padded
from lit_glm.data.datamodule import RecordDataModule
from lit_glm.data.memmap_dataset import MemmapDataset, SequenceLengths, open_dataset
from lit_glm.metrics.flops import FlopCounter, WorkTotals, compute_mfu, peak_key, published_flops, shared_context_flops
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.runtime_ops import RuntimeOps
from lit_glm.model.scoring import TRAIN_MASK, candidate_loss, candidate_scores


def configuration(*more: str) -> TrainConfig:
    return validate_config(
        compose_config("train", [*GOLDEN_RUN, "model.init_checkpoint=null", "data.cache_dir=null", *more]), TrainConfig
    )


@pytest.fixture(scope="module")
def split() -> MemmapDataset:
    return open_dataset(TRAIN_FILE, False, None)


def counted(config: TrainConfig, batch: Any) -> float:
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    # torch's own matmuls, which the counter sees; one call per group: padding of small groups costs more
    glm, _ = build_glm(config.model, RuntimeOps(max_padded_group=0))
    with flop_counter.FlopCounterMode(display=False) as counter:
        candidate_loss(candidate_scores(glm, batch, TRAIN_MASK)).backward()
    return float(counter.get_total_flops())


def test_shared_context_flops_match_torch_flop_counter(split: MemmapDataset) -> None:
    config = configuration("model.attention=matmul")
    batch = collate_packed(split, list(range(6)))
    model = config.model
    formula = shared_context_flops(model, batch.context_lengths, batch.candidate_rows).sum()
    # The last layer's queries of the contexts are computed with its keys and values, though nobody needs them.
    unneeded = 6.0 * model.hidden_size**2 * sum(batch.context_lengths)
    assert counted(config, batch) == pytest.approx(formula + unneeded, rel=1e-9)


def test_published_flops_match_torch_flop_counter(split: MemmapDataset) -> None:
    config = configuration("scoring=published", "model.attention=matmul", "model.activation_checkpointing=false")
    batch = collate_padded(split, [0, 1], 96)
    sequences = batch.score_shape[0] * batch.score_shape[1]
    assert counted(config, batch) == pytest.approx(published_flops(config.model, sequences, 96), rel=1e-9)


@pytest.mark.parametrize("scoring", ["shared_context", "published"])
@pytest.mark.parametrize("topology", ["1x1", "1x4"])
def test_flop_counter_totals_match_the_batches(split: MemmapDataset, scoring: str, topology: str) -> None:
    config = configuration(f"scoring={scoring}", f"topology={topology}", "bs=2")
    data = RecordDataModule(config, split, lambda: 0, False, lambda: None)
    counter = FlopCounter(config, split, data.sampler(0, 0))
    ranks = config.topology.world_size
    streams = [iter(data.sampler(0, rank)) for rank in range(ranks)]
    flops = rows = candidates = 0.0
    for step in range(1, 26):  # more than an epoch of 1x4
        for stream in streams:
            share = next(stream)
            candidates += sum(int(np.diff(split.example_candidate_end)[index]) for index in share)
            if scoring == "published":
                batch = collate_padded(split, share, 96)
                sequences = batch.score_shape[0] * batch.score_shape[1]
                flops += float(published_flops(config.model, sequences, 96))
                rows += sequences * 96
            else:
                flat = collate_packed(split, share)
                flops += float(shared_context_flops(config.model, flat.context_lengths, flat.candidate_rows).sum())
                rows += len(flat.tokens)
        work = counter.totals_until(step)
        assert (work.flops, work.rows, work.candidates) == pytest.approx((flops, rows, candidates))


def test_mfu_is_null_without_a_peak() -> None:
    rates = compute_mfu(configuration(), WorkTotals(1e12, 1000, 10), 2.0, 5.0, None)
    assert (rates["mfu"], rates["mfu_flagperf"]) == (None, None)
    assert (rates["tokens_per_s"], rates["candidates_per_s"]) == (500.0, 5.0)


def peak_of(config: TrainConfig) -> Optional[float]:
    return config.hardware.peak_tflops[peak_key(config, True)]


def test_mfu_equals_hand_computed_values() -> None:
    config = configuration("hardware=a100", "topology=1x2")
    rates = compute_mfu(config, WorkTotals(39e12, 1000, 10), 2.0, 10.0, peak_of(config))
    assert rates["mfu"] == pytest.approx(39e12 / 2 / (2 * 19.5e12))
    assert rates["mfu_flagperf"] == pytest.approx(6 * 0.33e9 * 512 * 10 / (2 * 19.5e12))
    rounded = configuration("hardware=a100", "precision.tf32=true")
    assert compute_mfu(rounded, WorkTotals(39e12), 2.0, 10.0, peak_of(rounded))["mfu"] == pytest.approx(
        39e12 / 2 / 156e12
    )


def test_peak_of_fp32_is_used_without_tf32() -> None:
    asked = "precision.tf32=true"
    assert peak_key(configuration("hardware=a100", asked), has_tf32=False) == "fp32"
    assert peak_key(configuration("hardware=bi_v100", asked), has_tf32=True) == "fp32"
    assert peak_key(configuration("hardware=cuda", asked), has_tf32=True) == "tf32"  # a card without a file of its own


def test_balancing_reduces_rank_imbalance() -> None:
    eval_split = open_dataset(EVAL_FILE, True, None)
    found = {}
    for balance in ("true", "false"):
        config = configuration("topology=1x2", f"data.balance_ranks={balance}")
        data = RecordDataModule(config, eval_split, lambda: 0, False, lambda: None)
        found[balance] = FlopCounter(config, eval_split, data.sampler(0, 0)).rank_imbalance(20)
    assert 0 <= found["true"] < found["false"]
    rows = SequenceLengths.from_dataset(eval_split).rows
    work = [[rows[batch].sum() for batch in data.sampler(0, 0).rank_batches(step)] for step in range(1, 21)]
    assert found["false"] == pytest.approx(np.mean([max(ranks) / np.mean(ranks) - 1 for ranks in work]))
    config = configuration()
    one = RecordDataModule(config, eval_split, lambda: 0, False, lambda: None)
    assert FlopCounter(config, eval_split, one.sampler(0, 0)).rank_imbalance(20) is None
