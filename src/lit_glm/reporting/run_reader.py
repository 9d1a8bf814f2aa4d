"""Reader of run folders in any state, which groups runs of the same measurement into rows.

A folder that cannot be read is reported and skipped; it does not affect the report of the others.
"""

import glob
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import psutil
from omegaconf import OmegaConf

from lit_glm.atomic_files import read_csv_rows, read_json
from lit_glm.config.key_aliases import migrate_names
from lit_glm.config.schema import DataConfig, SyntheticConfig, TrainConfig, iter_keys
from lit_glm.config.secrets import mask_config, mask_override
from lit_glm.config.tuned_values import TRIALS_FOLDER, TUNE_FILE
from lit_glm.metrics.registry import METRICS, as_number
from lit_glm.runs.environment import comparable_environment, environment_parts, read_environment
from lit_glm.runs.result import COMPLETE, settled

_TEXT_FIELDS = ("status", "hardware", "topology", "precision", "scoring", "fix_hp", "model", "error")
_SILENT_S = 120.0
_REPETITION = ("seed", "data.shuffle_seed")
"""Keys in which repetitions of one measurement may differ."""
_PATH_KEYS = ("data.out_dir", "data.train_file", "data.eval_file", "data.raw_dir", "data.vocab_file")
"""Keys of paths: runs on machines with other paths still count as repetitions."""
_FIELDS = {key: entry for key, _, entry in iter_keys(TrainConfig(data=DataConfig(synthetic=SyntheticConfig())))}
_NEUTRAL = {key: entry.metadata["neutral"] for key, entry in _FIELDS.items() if "neutral" in entry.metadata}
"""Values by which runs of versions that lack a key were computed."""
_MAY_DIFFER = {
    *(key for key, entry in _FIELDS.items() if not entry.metadata.get("hashed", True)),
    *(*_REPETITION, *_PATH_KEYS),
}
"""Keys in which the runs of a row may differ."""


@dataclass
class ReportRun:
    """Content of one run folder."""

    path: Path
    result: Dict[str, Any]
    environment: Dict[str, Any] = field(default_factory=dict)
    settings: Dict[str, Any] = field(default_factory=dict)
    """Flat configuration: dotted key -> value."""
    is_named: bool = False
    """Whether this folder itself was given on the command line, rather than a parent folder or a pattern."""

    @property
    def is_measurement(self) -> bool:
        """Whether the run belongs in the results table: complete, not simulated, not profiled; or named explicitly."""
        return self.is_named or (self.complete and not self.result.get("simulated") and not self.result.get("profiled"))

    @property
    def complete(self) -> bool:
        """Whether the run completed."""
        return self.result.get("status") in COMPLETE

    def number(self, key: str) -> Optional[float]:
        """Return a metric of the result; None unless it is a finite number."""
        return METRICS[key].value(self.result) if key in METRICS else as_number(self.result.get(key))

    def table(self, name: str) -> List[Dict[str, str]]:
        """Read the rows of steps.csv, evals.csv or memory.csv; empty without such a file."""
        try:
            return read_csv_rows(self.path / name)
        except OSError:
            return []


@dataclass
class ReportRow:
    """One row of the table: runs that differ only in seed or repetition."""

    runs: List[ReportRun]
    differs: Dict[str, Any] = field(default_factory=dict)
    """Settings that differ from those of other rows of the same name."""
    machine_differs: Dict[str, str] = field(default_factory=dict)
    """Environment entries that differ from those of other rows of the same name."""
    number: int = 0
    """Number of the row among rows of the same name, from 1; 0 if there is only one."""

    def __getitem__(self, key: str) -> Any:
        return self.runs[0].result.get(key)

    @property
    def converged(self) -> bool:
        """Whether all runs reached the target."""
        return all(run.result.get("converged") for run in self.runs)

    @property
    def nodes(self) -> Tuple[int, int]:
        """Nodes and devices per node, for sorting; (0, 0) if the topology is not of the form NxM."""
        nodes, _, devices = str(self["topology"]).partition("x")
        return (int(nodes), int(devices)) if nodes.isdecimal() and devices.isdecimal() else (0, 0)

    def values(self, key: str) -> List[float]:
        """Return a metric of all runs that have it."""
        return [value for value in (run.number(key) for run in self.runs) if value is not None]

    def median(self, key: str) -> Optional[float]:
        """Return the median over the runs; None if no run has a value."""
        values = self.values(key)
        return statistics.median(values) if values else None

    def spread(self, key: str) -> Optional[Tuple[float, float]]:
        """Return the lowest and the highest value; None for fewer than two values."""
        values = self.values(key)
        return (min(values), max(values)) if len(values) > 1 else None

    @property
    def typical(self) -> ReportRun:
        """Run whose p_core is closest to the median; the one that plots show."""
        middle = self.median("p_core") or 0.0
        return min(self.runs, key=lambda run: abs((run.number("p_core") or 0.0) - middle))


def find_runs(patterns: List[str]) -> Tuple[List[ReportRun], List[str]]:
    """Read run folders.

    Args:
        patterns: run folders, parent folders (sweeps), or globs of either.

    Returns:
        The distinct runs, in the order given and by name within a parent folder; and a message per path without a run.
    """
    runs: Dict[Path, ReportRun] = {}
    messages: List[str] = []
    for pattern in patterns:
        places = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        folders = [folder for place in places for folder in _find_run_folders(Path(place))]
        named_folder = Path(pattern).parent if Path(pattern).name == "result.json" else Path(pattern)
        if not places:
            messages.append(f"{pattern}: no such folder")
        elif not folders:
            messages.append(f"{pattern}: contains no run (no result.json)")
        for folder in folders:
            if _is_trial(folder):
                if folder in map(Path, places):
                    messages.append(f"{folder}: is a trial of tune; see tune.md of the search")
                continue
            try:
                run = runs.setdefault(folder.resolve(), _read_run(folder))
                run.is_named = run.is_named or folder == named_folder
            except (OSError, ValueError, RecursionError) as error:
                messages.append(f"{folder}: result.json cannot be read ({error})")
    return list(runs.values()), messages


def _is_trial(folder: Path) -> bool:
    """Return whether a run folder is a trial of `tune`: too short, and with the longest examples first."""
    search = folder.resolve().parent
    if (read_json(folder / "job.json") or {}).get("is_trial"):
        return True
    return search.name == TRIALS_FOLDER and (search.parent / TUNE_FILE).is_file()


def _find_run_folders(place: Path) -> Iterator[Path]:
    if place.name == "result.json":
        place = place.parent
    for root, folders, files in os.walk(str(place)):
        folders.sort(key=lambda name: (len(name), name) if name.isdigit() else (0, name))
        if "result.json" in files:
            # Another program's file of this name does not hide the runs below it.
            content = {} if "job.json" in files or ".hydra" in folders else read_json(Path(root) / "result.json") or {}
            if not content or "topology" in content:
                folders.clear()
            yield Path(root)
        if "jobs" in folders:  # of a sweep: reused runs stay in the folder of the earlier sweep
            for note in sorted((Path(root) / "jobs").glob("*.json")):
                run_dir = (read_json(note) or {}).get("run_dir")
                if isinstance(run_dir, str) and (Path(run_dir) / "result.json").is_file():
                    yield Path(run_dir)


def _read_run(folder: Path) -> ReportRun:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    result = migrate_names(result, "result.json") if isinstance(result, dict) else result
    if not isinstance(result, dict) or not {"hardware", "topology", "status"} <= set(result):
        raise ValueError("not a result of train")
    result = settled(result)
    result.update({key: str(result[key]) for key in _TEXT_FIELDS if result.get(key) is not None})
    if not result["hardware"] or not result["status"]:
        raise ValueError("hardware or status is empty")
    known = read_environment(folder)
    environment = {key: value for key, value in known.items() if _has_expected_type(key, value)}
    if "command" in environment:
        environment["command"] = [mask_override(word) for word in environment["command"]]
    if "parts" in environment:
        environment["parts"] = environment_parts(environment)
    if result["status"] == "running" and not _is_process_alive(folder, environment):
        result["status"] = "killed"
    return ReportRun(folder, result, environment, _read_flat_config(folder))


def _has_expected_type(key: str, value: Any) -> bool:
    """Return whether an entry of environment.json has the type that `train` writes."""
    if key in ("packages", "variables"):
        return isinstance(value, dict) and all(isinstance(version, str) for version in value.values())
    if key in ("devices", "command"):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if key == "parts":
        return isinstance(value, list)
    return not isinstance(value, (dict, list))


def _read_flat_config(folder: Path) -> Dict[str, Any]:
    """Read the flat configuration from job.json, else from Hydra's config.yaml."""
    config: Any = (read_json(folder / "job.json") or {}).get("config")
    try:
        if not isinstance(config, dict):
            # Never resolve: `${oc.env:NAME}` in a foreign folder would read the environment of this process.
            config = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "config.yaml"), resolve=False)
        return {**_NEUTRAL, **_flatten(mask_config(migrate_names(config, "config")))}
    except Exception:  # missing, truncated, or not a configuration
        return {}


def _is_process_alive(folder: Path, environment: Dict[str, Any]) -> bool:
    """Return whether a running run is alive: by its process on this machine, else by the age of its files."""
    pid = environment.get("pid")
    if isinstance(pid, int) and environment.get("host") == platform.node():
        try:
            line = " ".join(psutil.Process(pid).cmdline())
            return "lit_glm" in line or "lit-glm" in line
        except psutil.Error:
            return False
    newest = max((path.stat().st_mtime for path in folder.iterdir() if path.is_file()), default=0.0)
    return time.time() - newest < _SILENT_S


def _flatten(node: Any, prefix: str = "") -> Dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    flat: Dict[str, Any] = {}
    for key, value in node.items():
        flat.update(_flatten(value, f"{prefix}{key}."))
    return flat


def group_into_rows(runs: List[ReportRun]) -> List[ReportRow]:
    """Group runs into rows: one per hardware, topology, precision, fix_hp and scoring.

    Runs whose settings differ in more than the seed, or that were measured on different machines, get separate rows,
    which name the difference; so do simulated runs, and runs that did not complete.
    """
    groups: Dict[str, ReportRow] = {}
    for run in runs:
        key = json.dumps(
            [_row_name_fields(run), _comparability_key(run), _compared_settings(run)], sort_keys=True, default=str
        )
        groups.setdefault(key, ReportRow([])).runs.append(run)
    found = sorted(groups.values(), key=_row_order)
    namesakes: Dict[str, List[ReportRow]] = {}
    for row in found:
        namesakes.setdefault(json.dumps(_row_name_fields(row.runs[0]), default=str), []).append(row)
    for rows in namesakes.values():
        _name_differences(rows)
    return found


def _name_differences(rows: List[ReportRow]) -> None:
    """Number rows of the same name, and note in each what differs between them."""
    settings = [_compared_settings(row.runs[0]) for row in rows]
    machines = [comparable_environment(row.runs[0].environment) for row in rows]
    differing = _differing_names(settings)
    known = [machine for machine in machines if machine]
    differing_parts = _differing_names(known)
    for number, (row, row_settings, machine) in enumerate(zip(rows, settings, machines), 1):
        row.number = number if len(rows) > 1 else 0
        row.differs = {name: row_settings.get(name) for name in differing}
        # An entry may be known of one machine only.
        row.machine_differs = {name: machine.get(name, "unknown") for name in differing_parts if machine}
        if known and not machine:
            row.machine_differs = {"environment.json": "missing"}


def _differing_names(entries: List[Dict[str, Any]]) -> List[str]:
    names = sorted({name for entry in entries for name in entry})
    return [name for name in names if any(entry.get(name) != entries[0].get(name) for entry in entries)]


def _row_order(row: ReportRow) -> Tuple[Any, ...]:
    bs, lr = (as_number(row[key]) for key in ("bs", "lr"))
    numbers = (-1.0 if bs is None else bs, -1.0 if lr is None else lr)
    return str(row["hardware"]), row.nodes, str(row["precision"]), numbers, str(row["fix_hp"])


def _row_name_fields(run: ReportRun) -> List[Any]:
    fields = [run.result.get(key) for key in ("scoring", "hardware", "topology", "precision", "fix_hp")]
    return fields if run.settings else [*fields, run.result.get("model")]


def _comparability_key(run: ReportRun) -> List[Any]:
    """Return what must be equal within a row in addition to settings: machine and state."""
    kinds = [bool(run.result.get(key)) for key in ("simulated", "profiled")]
    state = [*kinds, run.is_measurement, run.complete or str(run.path), run.result.get("environment_changes") or []]
    machine = comparable_environment(run.environment) or str(run.path)  # an unknown machine equals no other
    return [*state, run.result.get("tf32"), run.result.get("runtime"), machine]


def _compared_settings(run: ReportRun) -> Dict[str, Any]:
    """Return the settings that must be equal within a row: those that decide what is computed and how fast.

    A variable of the hardware file counts with the value that it had. The callbacks of this package take no measured
    time, or mark the run.
    """
    variables = run.environment.get("variables") or {}
    data = {"data": run.result["data_fingerprint"]} if run.result.get("data_fingerprint") else {}
    shown_elsewhere = ("hardware.", "topology.", "logger.", "callbacks.progress.", "callbacks.profile.", "hydra.")
    peak = f"hardware.peak_tflops.{'tf32' if run.result.get('tf32') else run.result.get('precision')}"  # of mfu
    measured = ("hardware.env.", "hardware.runtime", peak)
    settings = {
        key: variables.get(key[len(measured[0]) :], value) if key.startswith(measured[0]) else value
        for key, value in run.settings.items()
        if key.startswith(measured) or (key not in _MAY_DIFFER and not key.startswith(shown_elsewhere))
    }
    return {**settings, **data}


def config_differences(one: ReportRun, other: ReportRun) -> List[Tuple[str, Any, Any]]:
    """List settings and versions in which two runs differ: (key, value of one, value of the other)."""
    names = ("python", "os", "kernel", "driver", "host", "device_name", "git_commit")

    def everything(run: ReportRun) -> Dict[str, Any]:
        packages = run.environment.get("packages") or {}
        values = {f"package {name}": version for name, version in packages.items()}
        values.update({f"environment {name}": run.environment.get(name) for name in names})
        return {**values, **run.settings}

    left, right = everything(one), everything(other)
    return [(key, left.get(key), right.get(key)) for key in sorted({*left, *right}) if left.get(key) != right.get(key)]
