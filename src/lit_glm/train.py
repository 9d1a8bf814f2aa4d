"""`python -m lit_glm.train`: one benchmark run, or a sweep of them with -m."""

import time

_ENTRY = time.monotonic()  # e2e_time counts from here

import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Dict, List  # noqa: E402

from lit_glm.config.app import checked, compose, run_app  # noqa: E402
from lit_glm.config.schema import TrainConfig  # noqa: E402

_sweep: Dict[Path, Path] = {}
"""Run folders of this sweep, in its order, and the folder of the sweep."""


def train(config: TrainConfig, composed: Any) -> int:
    """Run one job in the folder that Hydra has made for it."""
    from hydra.core.hydra_config import HydraConfig

    from lit_glm.batches.compact import open_data
    from lit_glm.bench.result import COMPLETE, read_result, table
    from lit_glm.hardware.runtimes import check_runtime
    from lit_glm.jobs.launch import run_job
    from lit_glm.jobs.resume import check_same, resolve
    from lit_glm.jobs.spec import FILE, Job
    from lit_glm.jobs.sweep import earlier_run
    from lit_glm.jobs.worker import Interrupted
    from lit_glm.record.synthetic import ensure

    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    single = hydra.mode is None or hydra.mode.name == "RUN"
    folder = None
    if config.run.resume is not None:
        folder = resolve(config.run.resume, config, run_dir)
    elif not single and config.sweep.skip_done:
        folder = earlier_run(config, run_dir)
    if folder is not None:
        check_same(config, folder)
        run_dir = folder.resolve()
    if not single:
        _sweep[run_dir] = Path(hydra.sweep.dir)
    result = read_result(run_dir) if folder is not None else None
    if result is not None and result.get("status") in COMPLETE:
        print(f"lit_glm: {run_dir}: the run is complete, there is nothing to do")
        print(table([result]))
        return 0
    if folder is None and (run_dir / FILE).exists():
        print(f"lit_glm: {run_dir} held another run, which is overwritten", file=sys.stderr)
    check_runtime(config.hardware)
    if config.data.synthetic is not None:
        ensure(config.data)
    open_data(config.data, config.model)
    entry = _ENTRY if single else time.monotonic()
    try:
        run_job(Job(config, entry, sys.argv, folder is not None), run_dir, in_process=single)
    except Interrupted as stop:
        print(f"lit_glm: {stop}; go on with run.resume={run_dir}", file=sys.stderr)
        if not single:
            raise KeyboardInterrupt from None  # the rest of the sweep is not wanted either
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
    _sweep.clear()
    try:
        return run_app("train", TrainConfig, train, _resume_in_place)
    except KeyboardInterrupt:
        return 130
    finally:
        if _sweep:
            from lit_glm.jobs.sweep import summarise

            print(summarise(list(_sweep), next(iter(_sweep.values()))))


if __name__ == "__main__":
    sys.exit(main())
