"""`callbacks=profile`: a few steps under torch's profiler, and what memory the step behind them takes, by kind."""

import os
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

import pytorch_lightning as pl
import torch
from torch import Tensor

from lit_glm.bench.kernels import Steps, kernels_document
from lit_glm.bench.lengths import Lengths
from lit_glm.bench.memory import Estimate, judge
from lit_glm.bench.recorder import Recorder, recorder_of
from lit_glm.errors import InputError
from lit_glm.files import replacing, write_text

FOLDER = "profile"
DOCUMENT = "kernels.md"
_BETWEEN, _PROFILING, _COUNTING, _DONE = range(4)


class Profile(pl.Callback):
    """On the first rank; the others train beside it."""

    def __init__(self, from_step: int = 10, steps: int = 5) -> None:
        """Choose.

        Args:
            from_step: the first profiled step, counted from 1.
            steps: how many.

        Raises:
            InputError: if one of them is below 1.
        """
        for name, value in (("from_step", from_step), ("steps", steps)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"callbacks.profile.{name}={value}: a whole number from 1 on")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on the screen are for those who write profilers
        self._from, self._count = from_step, steps
        self._state = _DONE
        self._profiler: Any = None
        self._first, self._steps_seen = 0, 0
        self._found: Optional[Steps] = None
        self._held = ExitStack()
        self._storages: Dict[int, int] = {}
        self._known: Set[int] = set()
        self._kinds: Dict[str, float] = {}
        self._folder = Path()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Whether there is anything to do here: a run that goes on keeps the profile that it has."""
        self._folder = Path(trainer.default_root_dir) / FOLDER
        if trainer.is_global_zero and not (self._folder / DOCUMENT).is_file():
            self._state = _BETWEEN

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to profile, or to count."""
        step = pl_module.steps_done + 1
        if self._state == _BETWEEN and self._found is None and step >= self._from:
            self._state, self._first = _PROFILING, step
            self._profiler = torch.profiler.profile(activities=torch.profiler.supported_activities())
            self._profiler.start()
        elif self._state == _BETWEEN and self._found is not None:
            self._state = _COUNTING
            self._known = {_storage(tensor).data_ptr() for tensor in pl_module.state_dict().values()}
            self._held.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """All that the backward pass needs is there: the moment at which a step holds most."""
        if self._state != _COUNTING:
            return
        self._held.close()
        self._kinds["activations"] = float(sum(self._storages.values()))
        snapshot = recorder_of(trainer).runtime.memory_snapshot()
        if snapshot is not None:
            self._folder.mkdir(exist_ok=True)
            with replacing(self._folder / "memory_snapshot.pickle") as temporary, temporary.open("wb") as file:
                pickle.dump({"segments": snapshot, "device_traces": []}, file)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """All gradients are there."""
        if self._state == _COUNTING:
            updated = [p for group in optimizer.param_groups for p in group["params"]]
            weights = list(pl_module.parameters())
            own = {id(parameter) for parameter in weights}
            masters = [parameter for parameter in updated if id(parameter) not in own]
            self._kinds["weights"] = _bytes(weights)
            self._kinds["gradients"] = _bytes([p.grad for p in [*weights, *masters] if p.grad is not None])
            self._kinds["optimizer"] = _bytes(masters)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End what `on_train_batch_start` began."""
        if self._state == _PROFILING and pl_module.steps_done >= self._first + self._count - 1:
            self._end_profile(pl_module.steps_done)
        elif self._state == _COUNTING:
            self._held.close()
            for optimizer in trainer.optimizers:
                state = [value for entry in optimizer.state.values() for value in entry.values()]
                tensors = [value for value in state if isinstance(value, Tensor)]
                self._kinds["optimizer"] = self._kinds.get("optimizer", 0.0) + _bytes(tensors)
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The run was shorter than what was asked for: what there is, is kept."""
        if self._state == _PROFILING:
            self._end_profile(pl_module.steps_done)
        if self._state == _BETWEEN and self._found is not None:
            self._write(trainer)
        elif self._state == _BETWEEN:
            print(
                f"lit_glm: callbacks=profile: no step was profiled: the run ended after step {pl_module.steps_done}, "
                f"before callbacks.profile.from_step={self._from}",
                flush=True,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """A run that failed in a profiled step leaves torch without a profiler and without hooks."""
        self._held.close()
        if self._state == _PROFILING:
            self._profiler.stop()
        self._state = _DONE

    # -- what is written -----------------------------------------------------------------------------------------

    def _end_profile(self, step: int) -> None:
        self._profiler.stop()
        self._folder.mkdir(exist_ok=True)
        with replacing(self._folder / "trace.json") as temporary:
            self._profiler.export_chrome_trace(str(temporary))
        self._found = Steps.of(self._profiler, self._first, step)
        self._profiler, self._state = None, _BETWEEN

    def _write(self, trainer: Any) -> None:
        self._state = _DONE
        recorder: Recorder = recorder_of(trainer)
        guess: Estimate = judge(recorder.config, Lengths.of(trainer.datamodule.split), recorder.runtime).guess
        assert self._found is not None
        text = kernels_document(self._found, self._kinds, guess, recorder.runtime.peak_memory(0))
        write_text(self._folder / DOCUMENT, text)
        print(
            f"lit_glm: profile of steps {self._found.first} to {self._found.last}: {self._folder}/{DOCUMENT}",
            flush=True,
        )

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def _storage(tensor: Tensor) -> Any:
    """Torch 1.12 has its storage under another name."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()


def _bytes(tensors: List[Any]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
