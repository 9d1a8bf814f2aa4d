"""`python -m lit_glm.tune [group=name] ...`: find the largest batch size that fits, and the fastest."""

import sys
from dataclasses import dataclass, field
from typing import Any

from lit_glm.config.hydra_main import output_dir, run_command
from lit_glm.config.schema import COUNT, POSITIVE, TrainConfig, at_least, key


@dataclass
class TuneOptions:
    """Options of `tune`: time limit, steps and repeats of the trials."""

    max_minutes: float = key(60.0, POSITIVE)
    steps: int = key(10, at_least(4))
    repeats: int = key(5, COUNT)


@dataclass
class TuneConfig(TrainConfig):
    """Configuration of `train` with the options of `tune`."""

    tune: TuneOptions = field(default_factory=TuneOptions)


def tune(config: Any, _composed: Any) -> int:
    """Run the search, or this node's part of it; return the exit status."""
    from lit_glm.hardware.env import set_hardware_env

    set_hardware_env(config.hardware)  # before anything imports torch

    from lit_glm.batch_size_search import Search

    return Search(config, output_dir(), sys.argv).run()


def main() -> int:
    """Run the command and return the exit status."""
    arguments = [word for word in sys.argv[1:] if not word.startswith("bs=")]  # the search determines it
    return run_command("tune", TuneConfig, tune, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
