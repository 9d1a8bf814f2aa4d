"""Points go to the loggers off the step path, but for the last: Lightning saves its loggers right after it."""

from types import SimpleNamespace
from typing import Any, List

import torch

from lit_glm.bench.curves import Curves
from lit_glm.bench.figures import Seconds


def test_loggers_are_at_rest_when_lightning_saves_them() -> None:
    done: List[str] = []
    recorder: Any = SimpleNamespace(
        evaluated_step=-1,
        accuracy=None,
        seconds=lambda: Seconds(1.0, 2.0, 3.0),
        samples_here=lambda: 40,
        peak_memory=lambda: 2.0**30,
        do_later=lambda call: (done.append("later"), call()),
        do_rest=lambda: done.append("rest"),
    )
    logger = SimpleNamespace(log_metrics=lambda metrics, step: done.append(f"{step}: {sorted(metrics)[0]}"))
    trainer: Any = SimpleNamespace(loggers=[logger], should_stop=False)
    outcome = SimpleNamespace(loss=torch.tensor(1.5), lr=0.1, grad_norm=None)
    curves = Curves(recorder, every_steps=10)
    for step, stops in ((9, False), (10, False), (11, True)):
        trainer.should_stop = stops
        curves.on_train_batch_end(trainer, SimpleNamespace(steps_done=step, outcome=outcome), None, None, 0)
    assert done == ["later", "10: mem/gib", "rest"]
