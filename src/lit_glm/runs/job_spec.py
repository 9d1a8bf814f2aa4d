"""job.json: the specification of a job for its ranks, and the hash that identifies equal jobs."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lit_glm
from lit_glm.atomic_files import read_json, write_json
from lit_glm.config.key_aliases import migrate_job
from lit_glm.config.schema import TrainConfig, iter_keys
from lit_glm.config.secrets import mask_config, mask_override
from lit_glm.errors import InputError, first_line

JOB_FILE = "job.json"
_SECRETS_VARIABLE = "LIT_GLM_SECRETS"
_RESUMABLE_SINCE = (0, 2)
"""Run folders of older versions are read (report, evaluate, export, plan), but not continued."""


@dataclass
class JobSpec:
    """Specification of one job: a validated configuration and its origin."""

    config: TrainConfig
    start_time: float
    """`time.monotonic()` at the entry of `train`; the clock is common to all processes of a machine."""
    command: List[str]
    is_resume: bool = False
    sweep_dir: Optional[str] = None
    """Folder of the sweep that the job belongs to."""
    is_trial: bool = False
    """Whether it is a trial of `tune`, which is no measurement of its own."""
    working_dir: str = field(default_factory=os.getcwd)
    """Working directory of the command, against which relative paths of the configuration are resolved."""

    def write(self, folder: Path) -> None:
        """Write job.json for the ranks, for resuming, and for the discovery of runs."""
        origin = {
            "config_hash": config_hash(self.config),
            "lit_glm": lit_glm.__version__,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        content = dataclasses.asdict(self)
        content.update(config=mask_config(content["config"]), command=[mask_override(word) for word in self.command])
        write_json(folder / JOB_FILE, {**origin, **content})

    def secrets_variable(self) -> Dict[str, str]:
        """Return the variable that passes a configuration with secrets to the ranks; {} if `write` masks nothing."""
        config = dataclasses.asdict(self.config)
        return {} if mask_config(config) == config else {_SECRETS_VARIABLE: json.dumps(config)}

    @classmethod
    def read(cls, folder: Path) -> "JobSpec":
        """Read the job that `write` stored in a folder.

        Raises:
            InputError: if job.json is damaged, or of a version with other keys.
        """
        content = read_job_json(folder)
        if content is None:
            raise InputError(f"{folder / JOB_FILE}: damaged or not written by lit_glm; this folder cannot be resumed")
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            given = json.loads(os.environ.get(_SECRETS_VARIABLE, "null"))  # in a rank of this job
            plain = _escape_interpolations(given or content["config"])
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), plain))
            return cls(**{**{key: value for key, value in content.items() if key in names}, "config": config})
        except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise InputError(
                f"{folder / JOB_FILE}: written by lit_glm {content.get('lit_glm', 'of an unknown version')}, cannot be "
                f"read by {lit_glm.__version__} ({reason}); use the version that started the run, or start a new one"
            ) from error


def read_run_config(folder: Path) -> TrainConfig:
    """Read the configuration of a run for a command that uses the run's data from any working directory.

    Returns:
        The configuration. Relative paths of the data are resolved against the working directory of the run. A path
        that exists only in the current directory is kept: the run folder may have been copied from another machine.

    Raises:
        InputError: see `JobSpec.read`.
    """
    job = JobSpec.read(folder)
    data = job.config.data
    for name in ("out_dir", "train_file", "eval_file", "cache_dir"):
        path = getattr(data, name)
        if path:
            from_working_dir = Path(job.working_dir) / path
            setattr(data, name, str(from_working_dir) if from_working_dir.exists() or not Path(path).exists() else path)
    return job.config


def _escape_interpolations(node: Any) -> Any:
    """Escape `${...}`: a foreign run folder must not read the environment of the user who opens it."""
    if isinstance(node, dict):
        return {key: _escape_interpolations(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escape_interpolations(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


def read_job_json(folder: Path) -> Optional[Dict[str, Any]]:
    """Return job.json with current names; None if it is missing, damaged or not a JSON object."""
    content = read_json(folder / JOB_FILE)
    return None if content is None else migrate_job(content)


def hashed_settings(config: TrainConfig) -> Dict[str, Any]:
    """Return all keys and values that decide what a job computes, flat."""
    settings = {
        key: mask_config({key: value})[key]
        for key, value, entry in iter_keys(config)
        if entry.metadata.get("hashed", True)
        and not ("neutral" in entry.metadata and value == entry.metadata["neutral"])
    }
    return {**settings, "profiled": True} if config.profiled else settings


def config_hash(config: TrainConfig) -> str:
    """Return a short hash of a configuration: equal for equal settings, wherever and whenever they were composed."""
    return hashlib.sha256(json.dumps(hashed_settings(config), sort_keys=True).encode()).hexdigest()[:16]


def ensure_resumable(folder: Path) -> None:
    """Reject a run folder of a version whose runs cannot be continued.

    Raises:
        InputError: names both versions.
    """
    version = str((read_job_json(folder) or {}).get("lit_glm") or lit_glm.__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _RESUMABLE_SINCE:
        raise InputError(
            f"run.resume={folder}: this run was started by lit_glm {version} and cannot be resumed by lit_glm "
            f"{lit_glm.__version__}; resume it with lit_glm {version}, or start a new run"
        )


def ensure_same_config(config: TrainConfig, folder: Path) -> None:
    """Reject resuming a run under a changed configuration.

    Raises:
        InputError: names the keys that differ, with both values.
    """
    ensure_resumable(folder)
    before, now = hashed_settings(JobSpec.read(folder).config), hashed_settings(config)
    differing = [
        f"{key}: {before.get(key)} there, {now.get(key)} here"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise InputError(
            f"run.resume={folder}: the run was started under another configuration:\n  " + "\n  ".join(differing)
        )
