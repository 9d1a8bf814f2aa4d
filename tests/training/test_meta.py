"""The step and the evaluation on device "meta": what reads a value or mixes devices there would stall a card.

A test double of a card: its tensors have shapes and types and no content, so that every read by the host is an error.
Numbers that the host must know (the loss, the norm that decides over a scaled step) are given to it.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest
import pytorch_lightning as pl
import torch

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.data.collate import collate_packed
from lit_glm.data.datamodule import collate_for
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.data.synthetic import ensure_synthetic_data
from lit_glm.hardware.accelerator import make_accelerator, make_strategy
from lit_glm.hardware.precision import LossScalingPrecision, make_precision
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model import attention
from lit_glm.model.checkpoint import build_glm
from lit_glm.training.evaluation import evaluate
from lit_glm.training.module import RecordModule

NEW = not torch.__version__.startswith("1.")
SMALL = ["model=glm_tiny", "data=synthetic", "data.synthetic.num_train=8", "data.synthetic.num_eval=8", "bs=3"]


class MetaRuntime(Runtime):
    """A card without memory; what is read of it is 1, and what an evaluation chose 0."""

    name = "meta"

    def device_count(self) -> int:
        return 1

    def device(self, index: int) -> torch.device:
        return torch.device("meta")

    def manual_seed(self, seed: int) -> None:
        pass

    def autocast(self, dtype: torch.dtype) -> Any:
        return torch.autocast("cpu", dtype=dtype)  # torch has none for meta: casts stay away, types of halves too

    def to_host_async(self, values: torch.Tensor, pending: Optional[Any] = None) -> Callable[[], List[Any]]:
        assert values.device.type == "meta"
        return lambda: [0 if values.dtype is torch.long else 1.0] * len(values)


class UnsizedBatches:
    """Batches of no known number: Lightning would gather it as a tensor and read it."""

    def __init__(self, batches: List[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


@contextmanager
def finite_gradient_norm() -> Iterator[None]:
    real, LossScalingPrecision.update_scale = LossScalingPrecision.update_scale, lambda self, norm: True  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        LossScalingPrecision.update_scale = real  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.skipif(not NEW, reason="torch 1.12 has too few operators for meta")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp", "fp16"])
@pytest.mark.parametrize(  # gradients are accumulated after the layout has been left
    ("layout", "accumulate"), [("published", 1), ("gathered", 1), ("flat", 1), ("gathered", 2)]
)
def test_training_step_reads_no_values_and_mixes_no_devices(
    precision: str, layout: str, accumulate: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = "published" if layout == "published" else "shared_context"
    how = [*SMALL, f"data.out_dir={data}", f"scoring={scoring}", f"precision={precision}"]
    config: Any = validate_config(
        compose_config("train", [*how, f"optimizer.gradient_accumulation_steps={accumulate}"]), TrainConfig
    )
    ensure_synthetic_data(config.data)
    if layout == "flat":
        flat = lambda batch, width, attend: attention.PerGroupAttention(  # noqa: E731
            batch.context_lengths, batch.candidate_rows, batch.row_candidate, attend
        )
        monkeypatch.setattr("lit_glm.model.scoring.choose_attention_layout", flat)
    runtime = MetaRuntime()
    split = open_dataset(config.data.train_file, False, str(data / "cache"))
    collate = collate_for(config)
    batches = [collate(split, [0, 1, 2]), collate(split, [3, 4])]
    assert (collate is collate_packed) == (layout != "published")
    plugin = make_precision(config, runtime, check_on_device=False)
    glm, _ = build_glm(config.model, runtime.model_ops())
    module = RecordModule(glm, config, runtime)
    trainer = pl.Trainer(
        accelerator=make_accelerator(runtime, "meta"),
        strategy=make_strategy(runtime, config.topology, 60.0),
        devices=1,
        plugins=[plugin],
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    seen: List[Any] = []
    with finite_gradient_norm():
        trainer.strategy.teardown = lambda: None  # type: ignore[method-assign]  # moves everything to the processor
        module.on_train_batch_end = lambda *_: seen.append(module.pending_metrics)  # type: ignore[assignment, method-assign]
        trainer.fit(module, UnsizedBatches(batches))  # type: ignore[arg-type]
    assert (module.steps_done, module.steps_skipped) == (2, 0)
    assert all(outcome.grad_norm.device.type == "meta" and outcome.loss == 1.0 for outcome in seen)
    module = plugin.convert_module(RecordModule(build_glm(config.model, runtime.model_ops())[0], config, runtime))
    held = open_dataset(config.data.eval_file, True, str(data / "cache"))
    with plugin.forward_context():
        _, chosen = evaluate(module.to("meta"), [collate(held, [0, 1, 2])], runtime, any_rank=lambda _: True)
    assert chosen == [(0, 0), (1, 0), (2, 0)]
