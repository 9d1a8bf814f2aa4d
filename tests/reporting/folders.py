"""Run folders as `train` leaves them, with figures of a test's choice."""

import functools
import json
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from lit_glm.config.hydra_main import compose_config, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.runs.job_spec import JobSpec

ENVIRONMENT = {
    "host": "host1",
    "pid": 1,
    "machine": "R480-X8",
    "os": "Ubuntu 20.04",
    "kernel": "5.4.0-26-generic",
    "packages": {"torch": "1.12.1+cpu", "xmlir": "0.0.1", "xacc": "0.1.0", "numpy": "1.24.4"},
    "container_image": "image:v1",
    "driver": "4.0.25",
    "has_driver": True,
    "device_name": "R300",
    "devices": ["R300"],
    "network": "InfiniBand, 200 Gb/s",
    "simulated": False,
}


@functools.lru_cache(maxsize=None)
def _compose(overrides: Tuple[str, ...]) -> TrainConfig:
    return validate_config(compose_config("train", list(overrides)), TrainConfig)


def make_run(
    path: Path,
    *overrides: str,
    environment: Optional[Dict[str, Any]] = None,
    steps: int = 40,
    losses: Optional[List[float]] = None,
    **result: Any,
) -> Path:
    """A complete run of R300 1x8 unless told otherwise; a result of None is left out of the row."""
    chosen = ["hardware=r300", "topology=1x8", *overrides]
    config = _compose(tuple(chosen))
    path.mkdir(parents=True)
    JobSpec(config, time.monotonic(), ["train", *chosen]).write(path)
    (path / "environment.json").write_text(json.dumps({**ENVIRONMENT, **(environment or {})}))
    losses = losses or [3.0 / (step + 1) for step in range(steps)]
    batch = config.global_batch
    lines = ["step,epoch,samples,loss,lr,grad_norm,data_s,compute_s,step_s,loss_scale"]
    lines += [
        f"{step},0,{step * batch},{loss},{1e-6 * step},1.0,0.01,0.9,{1.0 + 0.01 * (step % 7)},"
        for step, loss in enumerate(losses, 1)
    ]
    (path / "steps.csv").write_text("\n".join(lines) + "\n")
    (path / "evals.csv").write_text(f"step,samples,acc,seconds\n0,0,0.2,1.5\n{steps},{steps * batch},0.8052,1.6\n")
    (path / "memory.csv").write_text("step,seconds,gib\n0,5.0,10.5\n20,25.0,31.0\n40,45.0,31.8\n")
    row = {
        "status": "success",
        "hardware": config.hardware.name,
        "topology": config.topology.name,
        "precision": config.precision.name,
        "scoring": config.scoring.name,
        "fix_hp": config.fix_hp,
        "bs": config.bs,
        "step_s": {"p50": 1.03, "p90": 1.05, "p99": 1.06, "mean": 1.03, "count": steps - 2},
        "lr": config.lr,
        "seed": config.seed,
        "model": config.model.name,
        "tf32": config.precision.tf32,
        "e2e_time": 2000.0,
        "p_whole": 3.4,
        "p_train": 3.8,
        "p_core": 4.0,
        "acc": 0.8052,
        "mem_actual_gib": 31.8,
        "mem_total_gib": 32.0,
        "mfu": None,
        "converged": True,
        "simulated": False,
        "runtime": "xmlir",
        "interruptions": 0,
        "init_time": 30.0,
        "raw_train_time": 1900.0,
        "no_eval_time": 1800.0,
        "pure_compute_time": 1700.0,
        "num_trained_samples": steps * batch,
        "global_steps": steps,
        "schema_version": 1,
        **result,
    }
    (path / "result.json").write_text(json.dumps(row))
    return path
