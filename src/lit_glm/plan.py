"""`python -m lit_glm.plan [group=name,name] ...`: predict memory, time, throughput and energy of a run."""

import json
import logging
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, List, Tuple

from lit_glm.config.command_line import CommandLine
from lit_glm.config.hydra_main import load_config, run_command
from lit_glm.config.schema import TrainConfig
from lit_glm.console import set_up_console
from lit_glm.errors import InputError

log = logging.getLogger("lit_glm.plan")


@dataclass
class PlanOptions:
    """Options of `plan`: measured runs, and device counts of the plot."""

    runs: Any = None
    device_counts: List[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])


@dataclass
class PlanConfig(TrainConfig):
    """Configuration of `train` with the options of `plan`."""

    plan: PlanOptions = field(default_factory=PlanOptions)


def _combinations(line: CommandLine) -> List[List[str]]:
    """Return the overrides of each combination of the lists; `plan.*` overrides apply to all of them.

    Raises:
        InputError: on a search instead of a list.
    """
    plan_overrides: List[str] = []
    rest: List[str] = []
    for text, override in zip(line.overrides, line.parse()):
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise InputError(f"{text}: plan takes lists (bs=1,2,4), not intervals")
        key, _, value = text.partition("=")
        if key == "plan.runs" and override.is_sweep_override():
            text = f"plan.runs=[{value}]"
        (plan_overrides if key.startswith("plan.") else rest).append(text)
    return [[*overrides, *plan_overrides, *line.searchpath] for _, overrides in CommandLine(rest).combinations()]


def _with_limits(configs: List[Any], combinations: List[List[str]]) -> Tuple[List[Any], List[int], str]:
    """Return the combinations, the number of samples that each prediction is for, and a description.

    The fix_hp files have different limits, from 4,000 to millions of samples, and rows with different limits mislead:
    only limits of the command line may differ.
    """
    from lit_glm.reporting.published_rows import load_published_run_length

    given = {override.key_or_group for overrides in combinations for override in CommandLine(overrides).parse()}
    limits = [
        int(min(config.run.max_samples, (config.run.max_steps or math.inf) * config.global_batch)) for config in configs
    ]
    are_equal = len(set(limits)) == 1
    if {"run.max_samples", "run.max_steps"} & given or (are_equal and "experiment" in given):
        several = "the limit of each row (run.max_samples, run.max_steps)"
        return configs, limits, f"a run of {limits[0]:,} samples, the configured limit" if are_equal else several
    samples, run = load_published_run_length()
    configs = [replace(config, run=replace(config.run, max_samples=samples, max_steps=None)) for config in configs]
    reason = f"a run of {samples:,} samples, as in {run}; set run.max_samples= for another"
    return configs, [samples] * len(configs), reason


def _make_task(combinations: List[List[str]], as_json: bool) -> Any:
    """Return the task, which gets the first combination's configuration and predicts all combinations."""

    def task(config: Any, _composed: Any) -> int:
        from hydra.core.hydra_config import HydraConfig

        from lit_glm.planning.document import write_plan
        from lit_glm.planning.prediction import MeasuredRun, ignored_runs, predict, rank_speed
        from lit_glm.planning.workload import Workload, load_examples
        from lit_glm.reporting.published_rows import load_published_rows

        configs: List[Any] = [load_config("plan", overrides, PlanConfig) for overrides in combinations]
        configs, limits, reason = _with_limits(configs, combinations)
        if min(config.plan.device_counts, default=1) < 1:
            raise InputError(f"plan.device_counts={config.plan.device_counts}: must be at least 1")
        folder = Path(str(HydraConfig.get().run.dir)).resolve()
        given = config.plan.runs or []
        run_dirs = given.split(",") if isinstance(given, str) else map(str, given)
        measured = [MeasuredRun.read(Path(run_dir)) for run_dir in run_dirs if run_dir]
        published = load_published_rows()
        predictions, left_out = [], ignored_runs(measured, configs)
        for row_config, limit in zip(configs, limits):
            train, held, data = load_examples(row_config)
            work = Workload(row_config, train, held)
            if not work.has_enough_examples:
                shortage = f"{row_config.global_batch} examples per step, {len(train)} available"
                left_out.append(f"{row_config.topology.name}, bs={row_config.bs}: {shortage}")
                continue
            try:
                speed = rank_speed(row_config, measured, published)
                predictions.append(predict(row_config, speed, work, data, limit))
            except InputError as error:  # no speed is known; other rows may be predicted
                left_out.append(str(error))
        if not predictions:
            raise InputError("nothing to predict: " + "; ".join(dict.fromkeys(left_out)))
        shown = write_plan(folder, predictions, measured, published, (max(limits), reason), left_out)
        print(json.dumps([prediction.row() for prediction in predictions], indent=1) if as_json else shown)
        return 0

    return task


def main() -> int:
    """Run the command; return the exit status, 2 for an invalid configuration."""
    set_up_console()
    as_json = "--json" in sys.argv
    arguments = [word for word in sys.argv[1:] if word not in ("--json", "-m", "--multirun")]
    combinations: List[List[str]] = []
    try:
        line = CommandLine.read(arguments)
        if not line.is_help and all(line.parse_each()):
            combinations = _combinations(line)
            arguments = [*combinations[0][: len(combinations[0]) - len(line.searchpath)], *line.flags]
        return run_command("plan", PlanConfig, _make_task(combinations, as_json), arguments=arguments)
    except InputError as error:
        log.error(error)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
