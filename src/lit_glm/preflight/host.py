"""Checks of the machine and of its Python packages."""

import platform
import re
import sys
from importlib import metadata
from typing import Dict, List

import psutil
from packaging.requirements import Requirement

from lit_glm.check_result import CheckResult
from lit_glm.config.hydra_main import CONF_DIR
from lit_glm.metrics.system_info import describe_machine

_BUSY_PERCENT = 25.0


def check_host() -> CheckResult:
    """Describe this machine, and check whether other processes are using its CPUs."""
    busy = psutil.cpu_percent(interval=0.5)
    free = psutil.virtual_memory().available / 2**30
    said = f"{describe_machine()}; {free:.1f} GiB of memory free, CPUs {busy:.0f} % busy"
    if busy > _BUSY_PERCENT:
        return CheckResult("", "warn", said, "other processes are using the CPUs: measurements would not be comparable")
    return CheckResult("", "ok", said)


def tested_versions() -> "tuple[str, Dict[str, str]]":
    """Return the name and content of the constraints file that is tested with this Python version."""
    name = "seed.txt" if sys.version_info < (3, 9) else "current.txt"
    text = (CONF_DIR.parent / "constraints" / name).read_text(encoding="utf-8")
    return name, dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def check_packages() -> CheckResult:
    """Compare the installed packages with the project's requirements and with the tested versions."""
    name, tested = tested_versions()
    try:
        needs = [Requirement(text) for text in metadata.requires("lit-glm") or []]
    except metadata.PackageNotFoundError:
        return CheckResult("", "warn", "lit-glm is not installed as a package", "pip install -e . in its checkout")
    wrong: List[str] = []
    others: List[str] = []
    there: List[str] = []
    for need in needs:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        there.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} is not {need.specifier}")
        elif version.split("+")[0] != tested.get(need.name, version):
            others.append(f"{need.name} {version} (tested: {tested[need.name]})")
    python = f"Python {platform.python_version()}"
    if wrong:
        return CheckResult("", "fail", f"{python}: {', '.join(wrong)}", f"pip install -c constraints/{name} -e .")
    if others:
        return CheckResult("", "warn", f"{python}: {', '.join(others)}", f"other measurements are made with {name}")
    return CheckResult("", "ok", f"{python}, {', '.join(there)}: as in constraints/{name}")
