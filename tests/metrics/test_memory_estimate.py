"""The estimate of a step's memory against the kernel's own count, and what is said when it does not fit."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import List

import numpy as np
import psutil
import pytest
import torch

from conftest import GOLDEN_RUN, TRAIN_FILE
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import HardwareConfig, TopologyConfig, TrainConfig
from lit_glm.data.collate import PackedBatch, build_padding_index
from lit_glm.data.memmap_dataset import SequenceLengths, open_dataset
from lit_glm.hardware.runtimes.selection import make_runtime
from lit_glm.metrics import memory_estimate
from lit_glm.metrics.memory_estimate import (
    check_memory,
    count_parameters,
    estimate_memory,
    largest_fitting_bs,
    memory_message,
)
from lit_glm.model.checkpoint import build_glm, meta_state_dict
from lit_glm.model.scoring import TRAIN_MASK, candidate_loss, candidate_scores

MEASURE = """
import sys
import numpy as np
from lit_glm.compat import postpone_compiler
postpone_compiler()  # as a run does: else the memory of its import would be counted
import torch
from lit_glm.data.collate import build_padding_index
from lit_glm.data.collate import PackedBatch
from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.runtimes.cpu import CPURuntime
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.scoring import TRAIN_MASK, candidate_loss, candidate_scores
from lit_glm.training.optimizer import make_optimizer

def highest():
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

runtime = CPURuntime()
config = validate_config(compose_config("train", sys.argv[1:]), TrainConfig)
groups, n, m = config.bs, 230, 26
counting = torch.arange
tokens = torch.randint(5, 90, (groups * (n + m),))
batch = PackedBatch(
    tokens, tokens % 90, tokens % 3, tokens[-groups * m :], counting(groups * m) // 13, counting(2 * groups),
    [n] * groups, [m] * groups,
    build_padding_index(np.full(groups, n), np.full(groups, m), np.arange(groups * m) // 13),
    groups, 2,
)
before = highest()
glm, _ = build_glm(config.model, runtime.model_ops())
optimizer = make_optimizer(glm.train(), config.optimizer)
for _ in range(2):
    candidate_loss(candidate_scores(glm, batch, TRAIN_MASK)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(before, highest())
"""
SHAPE = ["model.num_layers=6", "model.hidden_size=256", "model.num_attention_heads=4", "model.vocab_size=4000"]


@pytest.mark.slow
@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_memory_estimate_is_close_to_measured_memory(dropout: str, tmp_path: Path) -> None:
    overrides = [*SHAPE, "bs=8", f"model.hidden_dropout={dropout}", f"model.attention_dropout={dropout}"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, highest = map(float, done.stdout.split())
    config = validate_config(compose_config("train", overrides), TrainConfig)
    lengths = SequenceLengths(np.full(8, 2), np.full(8, 256), np.full(8, 26), np.full(8, 230**2 + 26 * 256.0))
    guess = estimate_memory(config, lengths, before, saves_attention_probs=dropout != "0.0")
    assert guess.total - before == pytest.approx(highest - before, rel=0.35)


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="no fused attention")
@pytest.mark.parametrize("attention", ["auto", "matmul"])
@pytest.mark.parametrize("lengths", [[40, 40, 40, 40], [90, 20, 30, 20]])
@pytest.mark.parametrize("groups", [1, 2])
def test_activations_of_groups_padded_to_equal_size(groups: int, lengths: List[int], attention: str) -> None:
    """Devices other than CPUs pad the groups of a batch: what attention saves has the size of the longest."""
    bs, overrides = len(lengths) // groups, [*SHAPE, "hardware=cuda", f"model.attention={attention}"]
    overrides += [f"bs={bs}", "model.hidden_dropout=0.0", "model.attention_dropout=0.0"]
    config = validate_config(compose_config("train", overrides), TrainConfig)
    n, m = np.array(lengths), np.full(4, 6)
    count, owner = int(n.sum() + m.sum()), np.arange(24) // 3
    tokens, index = torch.randint(5, 90, (count,)), build_padding_index(n, m, owner)
    row_candidate, slot, each = torch.from_numpy(owner), torch.arange(8), 2 * groups
    batch = PackedBatch(
        tokens, tokens % 90, tokens % 3, tokens[-24:], row_candidate, slot, lengths, m.tolist(), index, bs, each
    )
    glm = build_glm(config.model)[0].train()
    own, saved = {weight.data_ptr() for weight in glm.state_dict().values()}, {}

    def count_bytes(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor):
        loss = candidate_loss(candidate_scores(glm, batch, TRAIN_MASK))
    assert loss.isfinite()
    rows, predicting, pairs = (part.reshape(bs, groups).sum(1) for part in (n + m, m, n**2 + m * (n + m)))
    lengths_of = SequenceLengths(np.full(bs, each), rows, predicting, pairs)
    guess = estimate_memory(config, lengths_of, 0.0, saves_attention_probs=attention == "matmul")
    assert guess.activations == pytest.approx(sum(saved.values()), rel=0.15 if lengths[0] == 40 or groups == 1 else 0.4)


def test_saved_attention_probabilities_of_padded_rows() -> None:
    """`published` pads each candidate's row, with its context, to the sequence length."""
    line = [*GOLDEN_RUN, "scoring=published", "model.activation_checkpointing=false"]
    config = validate_config(compose_config("train", [*line, "bs=2"]), TrainConfig)
    lengths = SequenceLengths(*(np.array(values) for values in ([3, 5, 2], [90, 120, 60], [9, 15, 6], [1, 1, 1])))
    saved, recomputed = (estimate_memory(config, lengths, 0.0, saves).total for saves in (True, False))
    length, model = config.data.max_seq_length, config.model
    assert saved - recomputed == 2 * 5 * length * length * model.num_attention_heads * model.num_layers * 4


def test_last_layer_that_predicts_in_all_rows_is_as_large_as_the_others() -> None:
    rows = np.array([40, 60])
    lengths = SequenceLengths(np.array([4, 6]), rows, rows, rows)
    totals = []
    for layers in (1, 2, 3):
        line = [*GOLDEN_RUN, f"model.num_layers={layers}", "model.activation_checkpointing=false", "bs=2"]
        config = validate_config(compose_config("train", line), TrainConfig)
        totals.append(memory_estimate._activation_bytes(config, lengths, 2, saves_attention_probs=False))
    head = 100 * config.model.vocab_size * 4 * memory_estimate._HEAD_COPIES
    assert totals[0] - head == totals[1] - totals[0] == totals[2] - totals[1] > 0


def test_parameter_count_matches_the_model() -> None:
    for name in ("glm_tiny", "glm_large"):
        config = validate_config(compose_config("train", [f"model={name}"]), TrainConfig)
        assert count_parameters(config.model) == sum(
            weight.numel() for weight in meta_state_dict(config.model).values()
        )


def test_sequence_lengths_from_hdf5_and_cache_agree() -> None:
    split = open_dataset(TRAIN_FILE, False, None)
    of_split = SequenceLengths.from_dataset(split)
    of_file = SequenceLengths.from_hdf5(TRAIN_FILE)
    np.testing.assert_array_equal(of_split.candidates, of_file.candidates)
    np.testing.assert_array_equal(of_split.predicting, of_file.predicting)
    alike = np.diff(split.example_group_end) == 1  # contexts of the others differ by truncation
    np.testing.assert_array_equal(of_split.rows[alike], of_file.rows[alike])
    assert (of_split.rows >= of_file.rows).all()


def test_dry_run_of_more_than_the_machine_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=3 * 2**30))
    line = ["hardware=r300", "hardware.runtime=simulated", "topology=1x2"]
    config = validate_config(compose_config("train", line), TrainConfig)
    lengths = SequenceLengths(*(np.full(9, value) for value in (10, 300, 50, 9e4)))
    checked = check_memory(config, lengths, make_runtime(config.hardware, config.topology))
    needed = 2 * checked.estimate.total / 2**30
    assert needed > 2 * 5  # two models of 335 million parameters with their gradients and Adam's moments
    assert f"dry run: 2 ranks need about {needed:.1f} GiB, this machine has 3.0 GiB; " in checked.host_message


def test_the_largest_bs_is_named_where_it_does_not_fit() -> None:
    config = validate_config(compose_config("train", [*GOLDEN_RUN, "bs=8", "hardware.runtime=simulated"]), TrainConfig)
    lengths = SequenceLengths.from_dataset(open_dataset(TRAIN_FILE, False, None))
    needed = [estimate_memory(config, lengths, 0.0, False, bs).total for bs in (3, 4)]
    assert largest_fitting_bs(config, lengths, 0.0, False, (needed[0] + needed[1]) / 2) == 3
    assert largest_fitting_bs(config, lengths, 0.0, False, 1.0) == 0
    assert largest_fitting_bs(config, lengths, 0.0, False, 1e15) == len(lengths)
    runtime = make_runtime(HardwareConfig(runtime="simulated", memory_gib=0.001), TopologyConfig(1, 1))
    assert "no bs fits" in memory_message(config, check_memory(config, lengths, runtime))
    line = memory_message(config, check_memory(config, lengths, runtime)).split("\n")[0]
    total, *parts = [float(number) for number in re.findall(r" (\d+\.\d+)(?=,| GiB| of|$)", line)]
    assert sum(parts[1:] if " of " in line else parts) == pytest.approx(total, abs=1e-9)  # what is read adds up
    roomy = make_runtime(HardwareConfig(runtime="simulated", memory_gib=320.0), TopologyConfig(1, 1))
    assert "\n" not in memory_message(config, check_memory(config, lengths, roomy))
