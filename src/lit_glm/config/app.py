"""Turns a command line into a checked configuration, and a wrong one into a message with exit status 2."""

import math
import os
import sys
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, TypeVar, Union

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_glm.config.explain import explain
from lit_glm.config.schema import out_of_range
from lit_glm.errors import InputError, RunError

_HERE = Path(__file__).resolve().parent
CONF = next(
    folder
    for folder in (_HERE.parent / "conf", _HERE.parent.parent.parent / "conf")  # in a wheel, in a checkout
    if (folder / "train.yaml").is_file()
)

Config = TypeVar("Config")


class Outcome(NamedTuple):
    """How a task ended, and in a sweep the figure that a sweeper optimises."""

    status: int
    objective: float = math.nan


def checked(cfg: DictConfig, schema: "type[Config]") -> Config:
    """Check names, types and ranges of a composed configuration.

    Args:
        cfg: what Hydra composed.
        schema: the dataclass it must fit, such as `TrainConfig`.

    Returns:
        The configuration as that dataclass, all interpolations resolved.

    Raises:
        InputError: on an unknown key, a wrong type or a value out of range; names all that are out of range.
    """
    try:
        # Merging the plain content closes the way round the schema that Hydra leaves open (`+typo=1`, `++typo=1`).
        # The two steps say different things: the first which name is unknown, the second which type is wrong.
        plain = OmegaConf.to_container(cfg, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(explain(error, schema, CONF)) from error
    complaints = out_of_range(config)
    if complaints:
        raise InputError("\n".join(complaints))
    return config


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration in this process, as the command line would."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides))


def run_app(
    config_name: str,
    schema: "type[Config]",
    task: Callable[[Config, DictConfig], Union[int, Outcome]],
    more_arguments: Optional[Callable[[List[str]], List[str]]] = None,
) -> int:
    """Run `task` under Hydra and return the exit status.

    Args:
        config_name: the primary file in conf/.
        schema: what the composed configuration must fit.
        task: gets the checked configuration and the composed one, returns an exit status or an `Outcome`.
        more_arguments: gets the overrides of the command line, returns further arguments for Hydra.

    Returns:
        0 done, 1 failed, 2 wrong input or configuration; what `task` returns, the highest over a sweep.
    """
    statuses = [0]

    def job(cfg: DictConfig) -> float:
        # Errors end here and not in Hydra: in a sweep the next combination still has its turn.
        environment = dict(os.environ)
        try:
            returned = task(checked(cfg, schema), cfg)
            outcome = returned if isinstance(returned, Outcome) else Outcome(returned)
        except (InputError, RunError) as error:
            print(f"lit_glm: {error}", file=sys.stderr)
            outcome = Outcome(error.exit_status)
        except OSError as error:
            if full_error or isinstance(error, BrokenPipeError):
                raise
            print(f"lit_glm: {error}", file=sys.stderr)
            outcome = Outcome(1)
        finally:  # a chip's variables are not the user's for the next combination
            os.environ.clear()
            os.environ.update(environment)
        statuses.append(outcome.status)
        return outcome.objective

    full_error = os.environ.get("HYDRA_FULL_ERROR")
    arguments = list(sys.argv)
    try:
        from hydra._internal.utils import get_args_parser

        parsed = get_args_parser().parse_args()
        if more_arguments is not None and not (parsed.help or parsed.hydra_help or parsed.cfg or parsed.info):
            sys.argv = arguments + more_arguments(parsed.overrides)
        if parsed.cfg and not parsed.multirun:
            checked(compose(config_name, parsed.overrides), schema)  # --cfg prints without running the task
        os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra raise, so that the message is ours
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except (InputError, RunError) as error:
        print(f"lit_glm: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `--help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        composing = len(statuses) == 1  # Hydra says some wrong overrides with a bare ValueError
        if full_error or not composing:
            raise
        print(f"lit_glm: {explain(error, schema, CONF)}", file=sys.stderr)
        return 2
    except OSError as error:
        if full_error or len(statuses) > 1:
            raise
        print(f"lit_glm: the run folder cannot be made: {error}; give hydra.run.dir= elsewhere", file=sys.stderr)
        return 2
    finally:
        sys.argv = arguments
        if full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    return max(statuses)
