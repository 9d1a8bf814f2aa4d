"""One model on one device in one precision, with the step that training makes, its batches and weights."""

import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor

from lit_glm.config.schema import LossScaleConfig, ModelConfig, TrainConfig
from lit_glm.data.cloze import encode_questions
from lit_glm.data.collate import PackedBatch, PaddedBatch, collate_packed, collate_padded
from lit_glm.data.h5sparse import SparseWriter
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.data.superglue_jsonl import Question
from lit_glm.hardware.precision import FP16Precision, LossScalingPrecision, backward_context, make_precision
from lit_glm.hardware.runtimes.base import Runtime
from lit_glm.model.checkpoint import build_glm
from lit_glm.model.glm import GLM
from lit_glm.model.scoring import EVAL_MASK, TRAIN_MASK, best_candidates, candidate_loss, candidate_scores
from lit_glm.training.optimizer import clip_gradients, make_optimizer

_WEIGHTS_SEED = 20231
_FIRST = 0x100  # first character; each character stands for one token


class _CharacterTokenizer:
    """Tokenizer that maps every character to one token."""

    eos, cls, mask, sop, eop = 0, 1, 2, 3, 4

    def __init__(self, vocab_size: int) -> None:
        self._size = vocab_size

    def encode(self, text: str) -> List[int]:
        return [5 + (ord(char) - _FIRST) % (self._size - 5) for char in text]


@dataclass
class VerifyFixture:
    """Model configuration and batches of a verification."""

    model: ModelConfig
    packed: PackedBatch
    padded: PaddedBatch

    def fresh_model(self) -> GLM:
        """Build a float32 model on the CPU; the same at every call."""
        torch.manual_seed(_WEIGHTS_SEED)
        return build_glm(self.model)[0]


def make_fixture(config: TrainConfig, examples: int = 2, candidates: int = 3) -> VerifyFixture:
    """Generate a fixture.

    Args:
        config: configuration that gives the shape; dropout is disabled.
        examples: number of examples B.
        candidates: number of candidates C.
    """
    model = replace(
        config.model, hidden_dropout=0.0, attention_dropout=0.0, init_checkpoint=None, activation_checkpointing=False
    )
    length = min(config.data.max_seq_length, model.max_sequence_length)
    draw = random.Random(_WEIGHTS_SEED)

    def text(count: int) -> str:
        return "".join(chr(_FIRST + draw.randrange(20000)) for _ in range(count))

    questions = []
    for number in range(examples):
        choices = [text(2 + number % 4) for _ in range(candidates)]  # equal lengths: longer ones are never chosen
        passage = text(int(length * (0.55 + 0.2 * number / max(1, examples - 1))))
        questions.append(Question(number, f"{number}", 1, passage, text(5), text(7), choices, choices[:1], [0]))
    encoded = encode_questions(questions, _CharacterTokenizer(model.vocab_size), length)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="lit_glm-verify-") as folder:
        writer = SparseWriter(Path(folder) / "some.hdf5", length)
        writer.add(encoded.columns, encoded.separators, encoded.counts, encoded.right)
        writer.close()
        split = open_dataset(Path(folder) / "some.hdf5", True, None)
        indices = list(range(examples))
        return VerifyFixture(model, collate_packed(split, indices), collate_padded(split, indices, length))


_LOSS_SCALE = 1024.0
_SEED = 7


class TrainStepper:
    """Model with optimizer and precision plugin that runs single training steps."""

    def __init__(self, config: TrainConfig, fixture: VerifyFixture, runtime: Runtime, exact: bool = False) -> None:
        """Build the model with the fixture's weights.

        Args:
            config: configuration with the precision.
            fixture: fixture with shape and weights.
            runtime: runtime of the device.
            exact: use float64 on the CPU instead, as the reference.
        """
        weights = fixture.fresh_model()
        self._runtime, self._steps = Runtime() if exact else runtime, 0
        self.device = torch.device("cpu") if exact else runtime.device(0)
        # Training starts with a high loss scale and skips steps until it fits; here no step may be skipped.
        scaled = replace(config, precision=replace(config.precision, loss_scale=LossScaleConfig(initial=_LOSS_SCALE)))
        plugin: Any = Precision() if exact else make_precision(scaled, runtime, check_on_device=False)
        self._plugin = plugin
        self.computes_in: torch.dtype = torch.float64 if exact else plugin.computes_in
        self.glm = weights.double() if exact else build_glm(fixture.model, runtime.model_ops())[0]
        if not exact:
            self.glm.load_state_dict(weights.state_dict())
            plugin.convert_module(self.glm).to(self.device)
        self._clip = config.optimizer.clip_grad
        self.optimizer = make_optimizer(self.glm.train(), config.optimizer)
        if isinstance(self._plugin, FP16Precision):
            self._plugin.wrap_optimizers([self.optimizer])

    def _backward(self, batch: Any) -> Tensor:
        """Run forward and backward pass, both within autocast as in training."""
        self._runtime.manual_seed(_SEED + self._steps)
        scaler = getattr(self._plugin, "scaler", None)
        with self._plugin.forward_context():
            loss = candidate_loss(candidate_scores(self.glm, batch, TRAIN_MASK))
            # As in training, before the backward pass is issued.
            self._read_loss = self._runtime.to_host_async(loss.detach().float().reshape(1))
            with backward_context(loss):
                (loss if scaler is None else scaler.scale(loss.float())).backward()
        return loss.detach()

    def _finish_step(self) -> None:
        """Finish a step as training does; a lazy runtime cuts and computes its graph here."""
        self._steps += 1
        self._runtime.after_step()
        self._runtime.synchronize()

    def train(self, batch: Any) -> float:
        """Run one step and return its loss before the update."""
        self._backward(batch.to(self.device))
        loss = float(self._read_loss()[0])
        scaled = self._plugin if isinstance(self._plugin, LossScalingPrecision) else None
        if scaled is not None:
            scaled.unscale_(self.optimizer)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = clip_gradients(trained, self._clip)
        if scaled is None or scaled.update_scale(norm):
            self.optimizer.step()
            if isinstance(self._plugin, FP16Precision):
                self._plugin.round_weights()
        self.optimizer.zero_grad(set_to_none=True)
        self._finish_step()
        return loss

    def evaluate(self, batch: Any) -> Tensor:
        """Compute the scores [B, C] of a batch as in an evaluation."""
        self.glm.eval()
        with torch.no_grad(), self._plugin.forward_context():
            table = candidate_scores(self.glm, batch.to(self.device), EVAL_MASK, slice_size=10)
            best_candidates(table)  # as an evaluation does: its operators are compared with the CPU's
        self.glm.train()
        self._finish_step()
        return table

    def capture(self, batch: Any) -> Tuple[List[Tuple[str, Tensor]], Dict[str, Tensor]]:
        """Return the activations of each stage in order, and the gradients of all parameters."""
        outputs: List[Tuple[str, Tensor]] = []
        transformer = self.glm.transformer
        stages = [(f"layer {number}", layer) for number, layer in enumerate(transformer.layers)]
        hooks = [
            stage.register_forward_hook(lambda _m, _i, out, name=name: outputs.append((name, out.detach())))
            for name, stage in [*stages, ("final norm", transformer.final_layernorm)]
        ]
        loss = self._backward(batch.to(self.device))
        for hook in hooks:
            hook.remove()
        self._finish_step()  # so that nothing is read from an uncomputed graph
        scale = getattr(self._plugin, "loss_scale", 1.0)
        gradients = {
            name: parameter.grad.detach().cpu().double() / scale
            for name, parameter in self.glm.named_parameters()
            if parameter.grad is not None
        }
        self.glm.zero_grad(set_to_none=True)
        table = self.evaluate(batch)
        is_candidate = table > EVAL_MASK / 2
        return [*outputs, ("scores", table[is_candidate]), ("loss", loss[None])], gradients
