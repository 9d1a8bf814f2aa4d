"""`python -m lit_glm.verify [overrides] [--json]`: numerical and timing acceptance test of a device."""

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from typing import Any, List

from hydra.core.hydra_config import HydraConfig

from lit_glm.atomic_files import make_folder
from lit_glm.config.command_line import CommandLine
from lit_glm.config.hydra_main import CONF_DIR, load_config, output_dir, run_command
from lit_glm.config.schema import POSITIVE, TrainConfig, key
from lit_glm.errors import InputError
from lit_glm.hardware.env import set_hardware_env
from lit_glm.process_utils import fast_imports

log = logging.getLogger("lit_glm.verify")


@dataclass
class VerifyOptions:
    """Options of `verify`: its time limit."""

    max_minutes: float = key(30.0, POSITIVE)


@dataclass
class VerifyConfig(TrainConfig):
    """Configuration of `train` with the options of `verify`."""

    verify: VerifyOptions = field(default_factory=VerifyOptions)


def _configs_per_precision(config: TrainConfig) -> List[TrainConfig]:
    """Return one configuration per precision: the given precision, else all that the hardware file lists."""
    line = CommandLine.read(sys.argv[1:])
    if line.sets("precision"):
        return [config]
    given = [*HydraConfig.get().overrides.task, *line.searchpath]
    return [load_config("verify", [*given, f"precision={name}"], VerifyConfig) for name in config.hardware.precisions]


def main() -> int:
    """Run the command; return 1 if any check failed, 2 for an invalid configuration, else 0."""
    as_json = "--json" in sys.argv

    def task(config: Any, _composed: Any) -> int:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # Kineto otherwise logs every start and stop
        set_hardware_env(config.hardware)  # before anything imports torch

        with fast_imports(config):
            from lit_glm.hardware.runtimes.selection import check_device_count, make_runtime, validate_devices
            from lit_glm.runs import environment
            from lit_glm.verification.acceptance import AcceptanceTest

        runtime = make_runtime(config.hardware, config.topology)
        check_device_count(runtime, config.topology)
        folder = output_dir()
        make_folder(folder)
        if (folder / environment.VERIFY_FILE).exists() and not environment.is_verification(folder):
            raise InputError(f"{folder}: its {environment.VERIFY_FILE} is not verify's; give another hydra.run.dir=")
        messages = validate_devices(config.hardware, runtime, config.topology.devices_per_node, CONF_DIR / "hardware")
        keys = [override.key_or_group for override in CommandLine.read(sys.argv[1:]).parse()]
        full_model = any(key.split(".")[0] in ("model", "experiment") for key in keys)
        if not as_json:
            for line in (*messages, f"writing verify.json to {folder}"):
                log.info(line)
        acceptance = AcceptanceTest(
            _configs_per_precision(config), runtime, full_model, 60.0 * config.verify.max_minutes
        )
        if not as_json:
            log.info(f"{acceptance.title()}")
        device = acceptance.device()
        for check in acceptance.checks():
            environment.write_verification(folder, device, acceptance.done, acceptance.passed, complete=False)
            if not as_json:
                print(check.line(), flush=True)
        content = environment.write_verification(folder, device, acceptance.done, acceptance.passed)
        failed = [check.name for check in acceptance.done if check.status == "fail"]
        if as_json:
            print(json.dumps(content, indent=1, ensure_ascii=False))
        else:
            log.info(f"{len(failed)} failed: {', '.join(failed)}" if failed else "nothing failed")
            log.info(f"results: {folder / environment.VERIFY_FILE}")
        return 1 if failed else 0

    return run_command("verify", VerifyConfig, task, arguments=[word for word in sys.argv[1:] if word != "--json"])


if __name__ == "__main__":
    sys.exit(main())
