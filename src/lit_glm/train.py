"""`python -m lit_glm.train`: one benchmark run, or a sweep of them with -m."""

import time

_ENTRY = time.monotonic()  # e2e_time counts from here

import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Callable, List, Tuple  # noqa: E402

from lit_glm.config.app import Outcome, checked, compose, run_app  # noqa: E402
from lit_glm.config.schema import TrainConfig  # noqa: E402
from lit_glm.errors import InputError  # noqa: E402


def train(config: TrainConfig, composed: Any) -> Outcome:
    """Run one job in the folder that Hydra has made for it."""
    from hydra.core.hydra_config import HydraConfig

    from lit_glm.hardware.variables import set_environment

    set_environment(config.hardware)  # before anything imports torch

    from lit_glm.batches.compact import open_data
    from lit_glm.hardware.runtimes import check_runtime
    from lit_glm.jobs.nodes import outer_rank
    from lit_glm.jobs.sweep import run_combination
    from lit_glm.record.synthetic import ensure

    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)

    def prepare_data() -> None:
        if config.data.synthetic is not None:
            ensure(config.data)
        open_data(config.data, config.model)

    check_runtime(config.hardware, config.topology)
    outer = outer_rank(config.topology)
    sweeps = hydra.mode is not None and hydra.mode.name != "RUN"
    if sweeps:
        if outer is not None:
            raise InputError("-m under torchrun: a sweep starts the ranks of its jobs itself; leave torchrun out")
        return run_combination(config, run_dir, Path(hydra.sweep.dir), int(hydra.job.num), prepare_data)
    if outer is not None:
        from lit_glm.jobs.outer import run_outer

        return Outcome(run_outer(config, outer, _ENTRY, lambda: _folder(config, run_dir), prepare_data))
    run_dir, resumes = _folder(config, run_dir)
    return Outcome(run(config, run_dir, resumes, _ENTRY, prepare_data))


def _folder(config: TrainConfig, run_dir: Path) -> Tuple[Path, bool]:
    """The run folder, and whether it holds a run that goes on."""
    from lit_glm.jobs.resume import check_same, resolve
    from lit_glm.jobs.spec import FILE

    folder = None if config.run.resume is None else resolve(config.run.resume, config, run_dir)
    if folder is not None:
        check_same(config, folder)
        return folder.resolve(), True
    if (run_dir / FILE).exists() and os.environ.get("NODE_RANK", "0") in ("", "0"):  # the first node keeps the folder
        print(f"lit_glm: {run_dir} held another run, which is overwritten", file=sys.stderr)
    return run_dir, False


def run(config: TrainConfig, run_dir: Path, resumes: bool, entry: float, prepare_data: Callable[[], None]) -> int:
    """Run one job unless it is complete; returns the exit status."""
    from lit_glm.bench.result import COMPLETE, read_result, table
    from lit_glm.jobs.interrupts import Interrupted
    from lit_glm.jobs.launch import run_job
    from lit_glm.jobs.spec import Job

    result = read_result(run_dir) if resumes else None
    if result is not None and result.get("status") in COMPLETE:
        print(f"lit_glm: {run_dir}: the run is complete, there is nothing to do")
        print(table([result]))
        return 0
    prepare_data()
    try:
        run_job(Job(config, entry, sys.argv, resumes), run_dir)
    except Interrupted as stop:
        print(f"lit_glm: {stop}; go on with run.resume={run_dir}", file=sys.stderr)
        return stop.exit_status
    return 0


def _more_arguments(overrides: List[str]) -> List[str]:
    """Tell Hydra which folder to use where it is not its to choose: of a run that goes on, and of ranks."""
    if int(os.environ.get("RANK", "0")) > 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        return ["hydra.run.dir=.", "hydra.output_subdir=null"]  # the first rank's folder is everybody's
    asked = [override.split("=", 1)[1] for override in overrides if override.startswith("run.resume=")]
    if not asked or asked[-1] in ("null", ""):
        return []
    from lit_glm.jobs.resume import resolve

    given = [override.split("=", 1)[1] for override in overrides if override.startswith("hydra.run.dir=")]
    config = checked(compose("train", overrides), TrainConfig)
    folder = resolve(asked[-1], config, Path(given[-1] if given else "outputs/date/time"))
    return [] if folder is None else [f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]


def main() -> int:
    """Compose, check and run; returns the exit status."""
    try:
        status = run_app("train", TrainConfig, train, _more_arguments)
    except KeyboardInterrupt:
        status = 130
    sweep = sys.modules.get("lit_glm.jobs.sweep")  # imported by Hydra when a sweep starts
    return status if sweep is None else max(status, sweep.finish())


if __name__ == "__main__":
    sys.exit(main())
