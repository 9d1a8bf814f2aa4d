"""`python -m lit_glm.train`: one benchmark run, or a sweep of them with -m."""

import time

_ENTRY = time.monotonic()  # e2e_time counts from here

import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, List  # noqa: E402

from lit_glm.config.app import checked, compose, run_app  # noqa: E402
from lit_glm.config.schema import TrainConfig  # noqa: E402


def train(config: TrainConfig, composed: Any) -> int:
    """Run one job in the folder that Hydra has made for it."""
    from hydra.core.hydra_config import HydraConfig

    from lit_glm.batches.compact import open_data
    from lit_glm.bench.result import COMPLETE, read_result, table
    from lit_glm.jobs.launch import run_job
    from lit_glm.jobs.resume import check_same, resolve
    from lit_glm.jobs.spec import Job
    from lit_glm.jobs.worker import Interrupted
    from lit_glm.record.synthetic import ensure

    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    resumes = False
    if config.run.resume is not None:
        folder = resolve(config.run.resume, config, run_dir)
        if folder is not None:
            check_same(config, folder)
            result = read_result(folder)
            if result is not None and result.get("status") in COMPLETE:
                print(f"lit_glm: {folder}: the run is complete, there is nothing to go on with")
                print(table([result]))
                return 0
            run_dir, resumes = folder.resolve(), True
    if config.data.synthetic is not None:
        ensure(config.data)
    open_data(config.data, config.model)
    single = hydra.mode is None or hydra.mode.name == "RUN"
    try:
        run_job(Job(config, _ENTRY if single else time.monotonic(), sys.argv, resumes), run_dir, in_process=single)
    except Interrupted as stop:
        print(f"lit_glm: {stop}; go on with run.resume={run_dir}", file=sys.stderr)
        return stop.exit_status
    return 0


def _resume_in_place(overrides: List[str]) -> List[str]:
    """With `run.resume`, tell Hydra to use the folder of the run that goes on, and to leave its files alone."""
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
    return run_app("train", TrainConfig, train, _resume_in_place)


if __name__ == "__main__":
    sys.exit(main())
