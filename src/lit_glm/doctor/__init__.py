"""`python -m lit_glm.doctor [overrides] [--json]`: what would go wrong in a long run, found out in half a minute."""

import json
import sys
from pathlib import Path
from typing import Any, Iterator

from hydra.core.hydra_config import HydraConfig

from lit_glm.config.app import run_app
from lit_glm.config.schema import TrainConfig
from lit_glm.doctor.finding import checked_by
from lit_glm.finding import Finding
from lit_glm.hardware.variables import set_environment


def examine(config: TrainConfig, place: Path) -> Iterator[Finding]:
    """Check one thing after the other.

    Args:
        config: of the run that is to come.
        place: folder that its run folder would be made in.
    """
    kept = set_environment(config.hardware)  # before anything imports torch

    from lit_glm.doctor import devices, files, machine, origin

    yield checked_by("machine", machine.describe)
    yield checked_by("software", machine.stack)
    found = checked_by("runtime", lambda: devices.runtime(config, kept))
    yield found
    runtime = found.made
    missing = "there is no runtime" if runtime is None else ""
    for name, check in (
        ("devices", devices.cards),
        ("precision", devices.arithmetic),
        ("port", devices.port),
        ("collectives", devices.collectives),
    ):
        if missing:
            yield Finding(name, "skip", f"not checked: {missing}")
            continue
        found = checked_by(name, lambda check=check: check(config, runtime))  # type: ignore[misc]
        yield found
        if found.status == "fail" and name in ("devices", "port"):
            missing = f"{name} failed"
    yield checked_by("disk", lambda: files.disk(config, place))
    for key in ("train_file", "eval_file"):
        yield checked_by(f"data.{key}", lambda key=key: files.data(config, key))  # type: ignore[misc]
    yield checked_by("checkpoint", lambda: files.checkpoint(config))
    yield checked_by("published files", lambda: origin.origin(config))
    yield checked_by("memory", lambda: files.memory(config, runtime))


def main() -> int:
    """Compose, check, say; returns 1 if any check failed, 2 for a wrong configuration."""
    arguments, as_json = list(sys.argv), "--json" in sys.argv

    def task(config: TrainConfig, _composed: Any) -> int:
        given = str(HydraConfig.get().run.dir)
        findings = []
        for finding in examine(config, Path("outputs" if given == "." else given)):
            findings.append(finding)
            if not as_json:
                print(finding.line(), flush=True)
        failed = [finding.name for finding in findings if finding.status == "fail"]
        if as_json:
            said = [{key: getattr(entry, key) for key in ("name", "status", "said", "advice")} for entry in findings]
            print(json.dumps({"ok": not failed, "checks": said}, indent=1, ensure_ascii=False))
        else:
            print(f"lit_glm: {len(failed)} failed: {', '.join(failed)}" if failed else "lit_glm: nothing failed")
            print(f"lit_glm: the chip's own arithmetic: python -m lit_glm.verify hardware={config.hardware.name}")
        return 1 if failed else 0

    sys.argv = [argument for argument in arguments if argument != "--json"]
    try:
        return run_app("doctor", TrainConfig, task)
    finally:
        sys.argv = arguments
