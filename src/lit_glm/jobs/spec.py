"""job.json: everything a rank needs to know of its job, and what says whether two jobs are the same."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List

from omegaconf import OmegaConf

from lit_glm.bench.result import write_json
from lit_glm.config.schema import TrainConfig, walk

FILE = "job.json"
_NOT_IDENTITY = (
    "run.resume",
    "run.stall_timeout_s",
    "data.cache_dir",
    "sweep.skip_done",
    "sweep.objective",
    "run.rendezvous_timeout_s",
    "report.machine",
    "report.card",
    "report.network",
    "report.driver",
    "report.image",
)
"""Keys that decide how a job is run and described, not what it computes."""


@dataclass
class Job:
    """One job: a checked configuration and where it came from."""

    config: TrainConfig
    entry: float
    """`time.monotonic()` at the entry of `train`; the clock is common to all processes of a machine."""
    command: List[str]
    resumes: bool = False

    def write(self, run_dir: Path) -> None:
        """Leave it in the run folder for the ranks, and for the next one who resumes."""
        write_json(run_dir / FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, run_dir: Path) -> "Job":
        """What `write` left."""
        content = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        content["config"] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), content["config"]))
        return cls(**content)


def settings(config: TrainConfig) -> Dict[str, Any]:
    """All keys and values that decide what a job computes, flat."""
    return {key: value for key, value in walk(config) if key not in _NOT_IDENTITY}


def identity(config: TrainConfig) -> str:
    """A short name for a configuration: equal for equal settings, wherever and whenever they were composed."""
    return hashlib.sha256(json.dumps(settings(config), sort_keys=True).encode()).hexdigest()[:16]
