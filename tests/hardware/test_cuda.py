"""On a real NVIDIA card, where there is one; each test skips itself with a reason elsewhere."""

import json
from pathlib import Path

import pytest
import torch

from conftest import GOLDEN_RUN, lit_glm, rows
from parity.test_training import check_trajectory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of a card is tested")
CARD = ["hardware=cuda", *GOLDEN_RUN]


def test_golden_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = lit_glm("train", *CARD, f"hydra.run.dir={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_trajectory(run, "tanh", 1)
    assert "fp32 (TF32 off)" in done.stdout
    result = json.loads((run / "result.json").read_text())
    assert (result["runtime"], result["simulated"], result["tf32"]) == ("cuda", False, False)
    assert 0 < result["mem_actual_gib"] < result["mem_total_gib"]


@pytest.mark.parametrize("precision", ["fp32", "amp", "fp16", "bf16"])
def test_each_precision_learns(precision: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    how = ["experiment=quickstart", "hardware=cuda", f"precision={precision}", f"hydra.run.dir={run}"]
    done = lit_glm("train", *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["status"] == "success"
    scaled = {row["loss_scale"] != "" for row in rows(run / "steps.csv")}
    assert scaled == {precision in ("amp", "fp16")}
