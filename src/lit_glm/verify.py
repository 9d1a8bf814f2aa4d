"""`python -m lit_glm.verify [overrides] [--json]`: which operator, layer or figure of a chip cannot be trusted."""

import json
import os
import sys
from pathlib import Path
from typing import Any, List

from hydra.core.hydra_config import HydraConfig

from lit_glm.config.command_line import CommandLine
from lit_glm.config.hydra_main import CONF_DIR, compose_config, run_command, validate_config
from lit_glm.config.schema import TrainConfig
from lit_glm.hardware.env import set_hardware_env


def _configs_per_precision(config: TrainConfig) -> List[TrainConfig]:
    """One a precision: the one that was asked for, else all that the chip lists."""
    line = CommandLine.read(sys.argv[1:])
    if line.sets("precision"):
        return [config]
    given = [*HydraConfig.get().overrides.task, *line.searchpath]
    return [
        validate_config(compose_config("verify", [*given, f"precision={name}"]), TrainConfig)
        for name in config.hardware.precisions
    ]


def main() -> int:
    """Compose, check, say; returns 1 if any check failed, 2 for a wrong configuration."""
    arguments, as_json = list(sys.argv), "--json" in sys.argv

    def task(config: TrainConfig, _composed: Any) -> int:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's library tells when it starts and stops
        set_hardware_env(config.hardware)  # before anything imports torch

        from lit_glm.hardware.runtimes.selection import check_device_count, make_runtime, validate_devices
        from lit_glm.runs import verifications
        from lit_glm.verification.acceptance import AcceptanceTest

        runtime = make_runtime(config.hardware, config.topology)
        check_device_count(runtime, config.topology)
        folder = Path(str(HydraConfig.get().run.dir)).resolve()
        kept = validate_devices(config.hardware, runtime, config.topology.devices_per_node, CONF_DIR / "hardware")
        keys = [override.key_or_group for override in CommandLine.read(sys.argv[1:]).parse()]
        whole = any(key.split(".")[0] in ("model", "experiment") for key in keys)
        acceptance = AcceptanceTest(_configs_per_precision(config), runtime, whole)
        if not as_json:
            print("\n".join(f"lit_glm: {line}" for line in (*kept, acceptance.title())), flush=True)
        for check in acceptance.checks():
            if not as_json:
                print(check.line(), flush=True)
        content = verifications.write_verification(folder, acceptance.device(), acceptance.done, acceptance.passed)
        failed = [check.name for check in acceptance.done if check.status == "fail"]
        if as_json:
            print(json.dumps(content, indent=1, ensure_ascii=False))
        else:
            print(f"lit_glm: {len(failed)} failed: {', '.join(failed)}" if failed else "lit_glm: nothing failed")
            print(f"lit_glm: {folder / verifications.VERIFY_FILE}")
        return 1 if failed else 0

    sys.argv = [argument for argument in arguments if argument != "--json"]
    try:
        return run_command("verify", TrainConfig, task)
    finally:
        sys.argv = arguments


if __name__ == "__main__":
    sys.exit(main())
