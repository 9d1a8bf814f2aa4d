"""The short loop over steps does what Lightning's does, and leaves the field to it where somebody may rely on it."""

from pathlib import Path
from typing import Any, Dict, List

import pytest
from pytorch_lightning import Callback

from conftest import GOLDEN_RUN, lit_glm_here, rows
from lit_glm.bench.result import read_result
from lit_glm.training.loop import _Steps


class Foreign(Callback):
    """A callback of a user's."""

    called: List[str] = []

    def on_train_batch_start(self, *_arguments: Any) -> None:
        self.called.append("start")

    def on_after_backward(self, *_arguments: Any) -> None:
        self.called.append("backward")

    def on_before_optimizer_step(self, *_arguments: Any) -> None:
        self.called.append("update")

    def on_train_batch_end(self, *_arguments: Any, **_more: Any) -> None:
        self.called.append("end")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_a_foreign_callback_all_is_lightnings_and_nothing_differs(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Foreign.called.clear()
    mine = f"+callbacks.mine._target_={Foreign.__module__}.Foreign"
    found: List[Dict[str, Any]] = []
    short, taken = _Steps.advance, []
    monkeypatch.setattr(_Steps, "advance", lambda loop, fetcher: (taken.append(1), short(loop, fetcher))[1])
    for name, more in (("short", []), ("lightnings", [mine])):
        run = tmp_path / name
        arguments = [*GOLDEN_RUN, "run.max_steps=4", f"precision={precision}", f"hydra.run.dir={run}", *more]
        assert lit_glm_here("train", *arguments) == 0
        assert len(taken) == 4  # of the short run alone
        assert Foreign.called == ([] if name == "short" else ["start", "backward", "update", "end"] * 4)
        steps = [{name: row[name] for name in ("step", "loss", "lr", "grad_norm")} for row in rows(run / "steps.csv")]
        result = read_result(run)
        assert result is not None
        found.append({"steps": steps, "acc": result["acc"], "done": result["global_steps"]})
    assert found[0] == found[1]
    assert found[0]["done"] == 4
