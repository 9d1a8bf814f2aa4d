"""`python -m lit_glm.plan [group=name,name] ...`: what a run would take, before anything is rented."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional, Union

from lit_glm.config.app import checked, compose, run_app
from lit_glm.config.line import CommandLine
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError


@dataclass
class PlanOptions:
    """What plan learns from and shows."""

    runs: Any = None
    cards: List[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])


@dataclass
class PlanConfig(TrainConfig):
    """The configuration of `train`, and what plan learns from."""

    plan: PlanOptions = field(default_factory=PlanOptions)


def _runs(given: Optional[Union[str, List[str]]]) -> List[Path]:
    texts = given.split(",") if isinstance(given, str) else given or []
    return [Path(str(text)) for text in texts if str(text)]


def _task(combinations: List[List[str]], as_json: bool) -> Any:
    """What is done with the first combination's configuration: all of them are predicted."""

    def task(config: Any, _composed: Any) -> int:
        from hydra.core.hydra_config import HydraConfig

        from lit_glm.plan.document import write
        from lit_glm.plan.predict import predict
        from lit_glm.plan.speed import Measured, speed_of
        from lit_glm.plan.workload import Workload, examples_of
        from lit_glm.report.published import load

        folder = Path(str(HydraConfig.get().run.dir)).resolve()
        measured = [Measured.read(path) for path in _runs(config.plan.runs)]
        published = load()
        predictions, left_out = [], []
        for overrides in combinations:
            own: Any = checked(compose("plan", overrides), PlanConfig)
            train, held, data = examples_of(own)
            work = Workload(own, train, held)
            if not work.enough:
                left_out.append(
                    f"{own.topology.name}, bs={own.bs}: {own.global_batch} examples a step, {len(train)} there"
                )
                continue
            predictions.append(predict(own, speed_of(own, measured, published, work), work, data))
        if not predictions:
            raise InputError("nothing to predict: " + "; ".join(left_out))
        shown = write(folder, predictions, measured, published, config, left_out)
        if as_json:
            print(json.dumps([prediction.row() for prediction in predictions], indent=1))
        else:
            print(shown)
        return 0

    return task


def main() -> int:
    """Compose, predict, say; returns 2 for a wrong configuration."""
    arguments, as_json = list(sys.argv), "--json" in sys.argv
    sys.argv = [argument for argument in arguments if argument not in ("--json", "-m", "--multirun")]
    try:
        combinations: List[List[str]] = []
        try:
            line = CommandLine.read(sys.argv[1:])
            if not line.asks:
                every = [whole for _, whole in line.combinations()]
                combinations = [[*whole, *line.searchpath] for whole in every]
                sys.argv = [sys.argv[0], *every[0], *line.flags]
        except Exception:  # noqa: BLE001  # said by `run_app`, which reads the same line
            pass
        return run_app("plan", PlanConfig, _task(combinations, as_json))
    finally:
        sys.argv = arguments
