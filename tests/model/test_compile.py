"""`model.compile=true`: the losses of eager mode, with dropout, on lengths that differ, from one graph per mode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import lit_glm, lit_glm_here, rows

if not hasattr(torch, "compile"):
    pytest.skip("torch.compile needs torch 2", allow_module_level=True)

from lit_glm.model import compile as model_compile

TRAIN = ["experiment=debug", "model.hidden_dropout=0.1", "model.attention_dropout=0.1", "run.max_steps=12"]


def losses(run: Path, *arguments: str) -> Any:
    assert lit_glm_here("train", *TRAIN, *arguments, f"hydra.run.dir={run}") == 0
    return np.array([float(row["loss"]) for row in rows(run / "steps.csv")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "scoring", "bound"),
    [("fp32", "shared_context", 1e-5), ("bf16", "shared_context", 0.05), ("fp32", "published", 1e-5)],
)
def test_compiled_losses_match_eager_mode(precision: str, scoring: str, bound: float, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    own = [f"precision={precision}", f"scoring={scoring}"]
    eager = losses(tmp_path / "eager", *own)
    torch.compiler.reset()  # graphs of an earlier test
    counters.clear()
    compiled = losses(tmp_path / "compiled", *own, "model.compile=true")
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    np.testing.assert_allclose(compiled, eager, rtol=bound)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-6 if precision == "fp32" else 1e-2)  # before any update


@pytest.mark.slow
def test_compile_without_a_compiler_is_rejected(tmp_path: Path) -> None:
    done = lit_glm(
        "train",
        "experiment=debug",
        "model.compile=true",
        "run.max_steps=1",
        cwd=tmp_path,
        env={"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 2
    assert "model.compile=true: torch.compile does not work on cpu here" in done.stderr
    assert "use model.compile=false" in done.stderr
    assert "Traceback" not in done.stderr


def test_compile_with_torch_without_compile_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_glm.errors import InputError

    monkeypatch.delattr(torch, "compile")
    with pytest.raises(InputError, match="needs torch 2.5"):
        model_compile.check_compile_available(torch.device("cpu"))
