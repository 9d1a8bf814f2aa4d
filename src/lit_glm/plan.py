"""`python -m lit_glm.plan [group=name,name] ...`: what a run would take, before anything is rented."""

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lit_glm.config.command_line import CommandLine
from lit_glm.config.hydra_errors import explain_hydra_error
from lit_glm.config.hydra_main import CONF_DIR, compose_config, run_command, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError


@dataclass
class PlanOptions:
    """What plan learns from and shows."""

    runs: Any = None
    device_counts: List[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])


@dataclass
class PlanConfig(TrainConfig):
    """The configuration of `train`, and what plan learns from."""

    plan: PlanOptions = field(default_factory=PlanOptions)


def _parse_run_dirs(given: Optional[Union[str, List[str]]]) -> List[Path]:
    texts = given.split(",") if isinstance(given, str) else given or []
    return [Path(str(text)) for text in texts if str(text)]


def _combinations(line: CommandLine) -> List[List[str]]:
    """Each combination of the lists; what plan itself is told belongs to all of them.

    Raises:
        InputError: on what is a search and no list.
    """
    own: List[str] = []
    rest: List[str] = []
    for text, override in zip(line.overrides, line.parse()):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise InputError(f"{text}: plan takes lists (bs=1,2,4), no intervals")
        key, _, value = text.partition("=")
        if key == "plan.runs" and override.is_sweep_override():
            text = f"plan.runs=[{value}]"
        (own if key.startswith("plan.") else rest).append(text)
    return [[*whole, *own, *line.searchpath] for _, whole in CommandLine(rest).combinations()]


def _validate_combination(overrides: List[str]) -> Any:
    """One combination.

    Raises:
        InputError: names what of it does not exist or fit.
    """
    try:
        return validate_config(compose_config("plan", overrides), PlanConfig)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(explain_hydra_error(error, PlanConfig, CONF_DIR)) from error


def _with_common_limit(configs: List[Any], combinations: List[List[str]]) -> Tuple[List[Any], int, str]:
    """The combinations, all with the same number of samples, that number, and what it is in words.

    The published values of the pairs have limits of their own, from 4,000 to millions: rows of unequal limits mislead.
    """
    from lit_glm.reporting.published_rows import load_published_run_length

    given = {text.partition("=")[0] for overrides in combinations for text in overrides}
    limits = {min(own.run.max_samples, (own.run.max_steps or math.inf) * own.global_batch) for own in configs}
    if len(limits) == 1 and {"run.max_samples", "run.max_steps", "experiment"} & given:
        samples = int(min(limits))
        return configs, samples, f"a run of {samples:,} samples, its limit"
    samples, run = load_published_run_length()
    reason = f"as {run} had; run.max_samples= gives another"
    if "run.max_samples" in given:
        samples, reason = max(own.run.max_samples for own in configs), "the largest run.max_samples"
    runs = [replace(own.run, max_samples=samples, max_steps=None) for own in configs]
    return (
        [replace(own, run=run) for own, run in zip(configs, runs)],
        samples,
        f"a run of {samples:,} samples, {reason}",
    )


def _make_task(combinations: List[List[str]], as_json: bool) -> Any:
    """What is done with the first combination's configuration: all of them are predicted."""

    def task(config: Any, _composed: Any) -> int:
        from hydra.core.hydra_config import HydraConfig

        from lit_glm.planning.cost_model import MeasuredRun, ignored_runs, rank_speed
        from lit_glm.planning.document import write_plan
        from lit_glm.planning.prediction import predict
        from lit_glm.planning.workload import Workload, load_examples
        from lit_glm.reporting.published_rows import load_published_rows

        configs = [_validate_combination(overrides) for overrides in combinations]
        configs, samples, reason = _with_common_limit(configs, combinations)
        if min(config.plan.device_counts, default=1) < 1:
            raise InputError(f"plan.device_counts={config.plan.device_counts}: numbers from 1 on")
        folder = Path(str(HydraConfig.get().run.dir)).resolve()
        measured = [MeasuredRun.read(path) for path in _parse_run_dirs(config.plan.runs)]
        published = load_published_rows()
        predictions, left_out = [], ignored_runs(measured, configs)
        for own in configs:
            train, held, data = load_examples(own)
            work = Workload(own, train, held)
            if work.enough:
                predictions.append(predict(own, rank_speed(own, measured, published, work), work, data, samples))
                continue
            asked = f"{own.global_batch} examples a step, {len(train)} there"
            left_out.append(f"{own.topology.name}, bs={own.bs}: {asked}")
        if not predictions:
            raise InputError("nothing to predict: " + "; ".join(left_out))
        shown = write_plan(folder, predictions, measured, published, configs, (samples, reason), left_out)
        print(json.dumps([prediction.row() for prediction in predictions], indent=1) if as_json else shown)
        return 0

    return task


def main() -> int:
    """Compose, predict, say; returns 2 for a wrong configuration."""
    arguments, as_json = list(sys.argv), "--json" in sys.argv
    sys.argv = [argument for argument in arguments if argument not in ("--json", "-m", "--multirun")]
    combinations: List[List[str]] = []
    try:
        line = CommandLine.read(sys.argv[1:])
        if not line.is_help and all(line.parse_each()):
            combinations = _combinations(line)
            first = combinations[0][: len(combinations[0]) - len(line.searchpath)]
            sys.argv = [sys.argv[0], *first, *line.flags]
        return run_command("plan", PlanConfig, _make_task(combinations, as_json))
    except InputError as error:
        print(f"lit_glm: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        sys.argv = arguments


if __name__ == "__main__":
    sys.exit(main())
