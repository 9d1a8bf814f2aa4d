"""Machine and software of each part of a run, their comparison, verifications of the device. Imports no torch."""

import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from lit_glm.atomic_files import make_folder, read_json, write_json
from lit_glm.check_result import CheckResult
from lit_glm.config.key_aliases import migrate_names
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.device_monitor import monitor_for
from lit_glm.hardware.env import COMPILERS, FRAMEWORKS
from lit_glm.hardware.monitors import cpu_name, visible_device
from lit_glm.openmp import available_cores

ENVIRONMENT_FILE = "environment.json"
_MACHINE = ("devices", "runtime", "driver", "cpu", "cpu_count", "cores", "threads")
_STACK = ("torch", *FRAMEWORKS, *COMPILERS)
Difference = Tuple[str, str, str]
"""Name of a field that differs, and its two values."""


def read_environment(run_dir: Path) -> Dict[str, Any]:
    """Read the environment of a run's newest part, with all parts under `parts`; {} if not written yet."""
    return migrate_names(read_json(run_dir / ENVIRONMENT_FILE) or {}, ENVIRONMENT_FILE)


def write_environment(run_dir: Path, part: Dict[str, Any], is_resume: bool) -> None:
    """Write the environment of this part of a run, after the entries of the earlier parts."""
    before = environment_parts(read_environment(run_dir)) if is_resume else []
    write_json(run_dir / ENVIRONMENT_FILE, {**part, "parts": [*before, part]})


def environment_parts(environment: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the entry of each part of a run, oldest first."""
    parts = environment.get("parts")
    if isinstance(parts, list):
        return [part for part in parts if isinstance(part, dict)]
    return [environment] if environment else []


def comparable_environment(environment: Dict[str, Any]) -> Dict[str, str]:
    """Return the known fields of machine and software that measurements depend on, as strings."""
    packages = environment.get("packages")
    versions = packages if isinstance(packages, dict) else {}
    values = {name: environment.get(name) for name in _MACHINE}
    devices = values.get("devices")
    if isinstance(devices, list):
        values["devices"] = ", ".join(dict.fromkeys(str(name) for name in devices))
    values.update({name: versions.get(name) for name in _STACK})
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


def environment_differences(one: Dict[str, Any], other: Dict[str, Any]) -> List[Difference]:
    """Return the differences between two environments, in the fields that both have."""
    left, right = comparable_environment(one), comparable_environment(other)
    return [(name, left[name], right[name]) for name in left if name in right and left[name] != right[name]]


def environment_changes(environment: Dict[str, Any]) -> List[str]:
    """Return the differences between the parts of a run, as strings; empty if machine and software did not change."""
    parts = environment_parts(environment)
    changes = [change for pair in zip(parts, parts[1:]) for change in environment_differences(*pair)]
    return list(dict.fromkeys(f"{name} {before} -> {after}" for name, before, after in changes))


def installed_versions(packages: Iterable[str]) -> Dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def local_environment(config: TrainConfig) -> Dict[str, Any]:
    """Return what is known of this machine and its software without importing torch, as in environment.json."""
    packages = installed_versions(_STACK)
    environment = {"cpu": cpu_name(), "cpu_count": os.cpu_count(), "cores": available_cores(), "packages": packages}
    monitor = monitor_for(config.hardware)
    if monitor is None or monitor.visible_devices_variable is None:
        return environment
    names = {str(index): name for index, name in monitor.device_names().items()}
    visible = [visible_device(i, monitor.visible_devices_variable) for i in range(config.topology.devices_per_node)]
    devices: List[Optional[str]] = [names.get(monitor.resolve(card) or "") for card in visible]
    driver = config.report.driver or monitor.driver_version()
    return {**environment, "driver": driver, "devices": None if None in devices else devices}


VERIFY_FILE = "verify.json"
FOLDER = "verify"
_SCHEMA_VERSION = 1
_KEYS = ("name", "status", "message", "value", "bound", "advice")
_DEPTHS = ("", "*/", "*/*/", "*/*/*/")
"""Depths of verify.json below outputs/verify/: DATE/TIME, with a number in a sweep, and what hydra.run.dir may give."""
_ABOVE = 6  # levels above a run at which outputs/ is searched


def write_verification(
    folder: Path, device: Dict[str, Any], checks: List[CheckResult], precisions: Dict[str, bool], complete: bool = True
) -> Dict[str, Any]:
    """Write and return the results of a verification so far.

    Args:
        folder: folder of verify.json.
        device: hardware, runtime, driver and similar fields.
        checks: all results.
        precisions: whether all checks of a precision passed, for each precision that was tested.
        complete: whether all checks have finished.
    """
    content = {
        "schema_version": _SCHEMA_VERSION,
        "complete": complete,
        "ok": not any(check.status == "fail" for check in checks),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        **device,
        "precisions": precisions,
        "checks": [{key: getattr(check, key) for key in _KEYS} for check in checks],
    }
    make_folder(folder)
    write_json(folder / VERIFY_FILE, content)
    return content


def is_verification(folder: Path) -> bool:
    """Return whether verify.json of a folder is the result of a verification."""
    return {"schema_version", "precisions", "checks"} <= set(read_json(folder / VERIFY_FILE) or {})


def latest_verification(
    starts: Iterable[Path], hardware: str, driver: Optional[str], precision: str, runtime: Optional[str] = None
) -> Optional[Dict[str, Any]]:
    """Return the newest verification, passed or failed, of a hardware, driver, precision and runtime; None without one.

    Verifications of simulated devices, or computed on the CPU instead of the device, do not count.

    Args:
        starts: folders at and above which `outputs/verify` is searched: the run folder, and the working directory.
        hardware: name of the hardware file.
        driver: version of the device driver; None if there is none.
        precision: name of the precision.
        runtime: name of the runtime; None: any.
    """
    verifications = []
    above = [folder for start in starts for folder in (start, *list(start.resolve().parents)[:_ABOVE])]
    for place in dict.fromkeys(folder / name for folder in above for name in (f"outputs/{FOLDER}", FOLDER)):
        for file in (file for depth in _DEPTHS for file in place.glob(f"{depth}{VERIFY_FILE}")):
            content = read_json(file) or {}
            fits = (content.get("hardware"), content.get("driver")) == (hardware, driver)
            fits = fits and runtime in (None, content.get("runtime"))
            verified = content.get("precisions")
            is_real = not content.get("simulated") and not content.get("computed_on_cpu")
            if fits and is_real and isinstance(verified, dict) and precision in verified:
                verifications.append({**content, "file": str(file), "passed": bool(verified[precision])})
    return max(verifications, key=lambda content: str(content.get("finished")), default=None)
