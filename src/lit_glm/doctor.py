"""`python -m lit_glm.doctor [overrides] [--json]`: pre-flight checks before a long run (30 s)."""

import json
import logging
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

from hydra.core.hydra_config import HydraConfig

from lit_glm.check_result import CheckResult
from lit_glm.config.command_line import suggest_command
from lit_glm.config.hydra_main import run_command
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError, RunError
from lit_glm.hardware.env import set_hardware_env
from lit_glm.isolated_process import share_isolated_process
from lit_glm.launch.signals import reraise_interruption
from lit_glm.process_utils import fast_imports

log = logging.getLogger("lit_glm.doctor")

_DATA = "copy the file again and compare the sizes, or recreate it with python -m lit_glm.prepare"
_ADVICE = {
    "devices": "choose a topology or a hardware file that fits, or check what hides devices (..._VISIBLE_DEVICES)",
    "precision": "choose another precision",
    "port": "set MASTER_PORT to a free port, the same on every node, or unset it on a single node",
    "collectives": "check the network between the ranks and the variables of the collective library",
    "data.train_file": _DATA,
    "data.eval_file": _DATA,
    "checkpoint": "copy the checkpoint again and compare the sizes; its shapes must be those of model=...",
}
"""Advice for errors whose message contains none, by check."""


def run_check(name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """Run a check; an exception becomes a failed result."""
    try:
        with reraise_interruption():
            result = check()
    except (InputError, RunError) as error:
        first, *more = [line.strip() for line in str(error).splitlines()]
        return CheckResult(name, "fail", first, "; ".join(more) or _ADVICE.get(name, ""))
    except Exception as error:  # a check must never hide the others
        return CheckResult(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")
    result.name = name
    result.message = " ".join(result.message.split())
    return result


def run_checks(config: TrainConfig, output_dir: Path) -> Iterator[CheckResult]:
    """Run all checks in order, and yield their results.

    Args:
        config: configuration of the planned run.
        output_dir: folder in which its run folder would be created.
    """
    env_messages = set_hardware_env(config.hardware)  # before anything imports torch

    with fast_imports(config):
        from lit_glm import preflight
        from lit_glm.hardware import precision  # noqa: F401 (imports Lightning, which a check needs)

    yield run_check("machine", preflight.check_host)
    yield run_check("software", preflight.check_packages)
    result = run_check("runtime", lambda: preflight.check_runtime(config, env_messages))
    yield result
    runtime = result.artifact
    missing = "there is no runtime" if runtime is None else ""
    for name, check in (
        ("devices", preflight.check_devices),
        ("precision", preflight.check_precision),
        ("port", preflight.check_rendezvous_port),
        ("collectives", preflight.check_collectives),
    ):
        if missing:
            yield CheckResult(name, "skip", f"not checked: {missing}")
            continue
        result = run_check(name, lambda check=check: check(config, runtime))  # type: ignore[misc]
        yield result
        if result.status == "fail" and name in ("devices", "port"):
            missing = f"{name} failed"
    yield run_check("disk", lambda: preflight.check_disk(config, output_dir))
    for key in ("train_file", "eval_file"):
        yield run_check(f"data.{key}", lambda key=key: preflight.check_data(config, key))  # type: ignore[misc]
    yield run_check("checkpoint", lambda: preflight.check_checkpoint(config))
    yield run_check("published files", lambda: preflight.check_provenance(config))
    yield run_check("memory", lambda: preflight.check_memory(config, runtime))


def main() -> int:
    """Run the command; return 1 if any check failed, 2 for an invalid configuration, else 0."""
    as_json = "--json" in sys.argv

    def task(config: TrainConfig, _composed: Any) -> int:
        given = str(HydraConfig.get().run.dir)
        results = []
        with share_isolated_process():  # several checks read the data files
            for result in run_checks(config, Path("outputs" if given == "." else given)):
                results.append(result)
                if not as_json:
                    print(result.line(), flush=True)
        failed = [result.name for result in results if result.status == "fail"]
        if as_json:
            names = ("name", "status", "message", "advice")
            rows = [{name: getattr(entry, name) for name in names} for entry in results]
            print(json.dumps({"ok": not failed, "checks": rows}, indent=1, ensure_ascii=False))
        else:
            log.info(f"{len(failed)} failed: {', '.join(failed)}" if failed else "nothing failed")
        if not as_json and not failed:
            command = suggest_command(sys.argv, "verify", f"hardware={config.hardware.name}")
            log.info(f"to test the device's arithmetic: {command}")
        return 1 if failed else 0

    return run_command("doctor", TrainConfig, task, arguments=[word for word in sys.argv[1:] if word != "--json"])


if __name__ == "__main__":
    sys.exit(main())
