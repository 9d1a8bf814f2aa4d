"""Before a sweep's first job: is its folder free, and which combinations are there already?"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lit_glm.config.app import checked, compose
from lit_glm.config.line import CommandLine
from lit_glm.config.ranges import FIGURES
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.jobs.summary import NOTES
from lit_glm.jobs.sweep import SweepNotes, places
from lit_glm.runs import find
from lit_glm.runs.job import identity
from lit_glm.runs.lock import alone_in
from lit_glm.runs.result import is_complete

_WRITES = ("sweep.md", "sweep.csv", "multirun.yaml")
_MOST_LOOKED_AT = 300
_kept = ExitStack()  # the sweep's folder, as long as this process lives


def check_start(whole: Any, line: CommandLine) -> None:
    """Take the folder of a sweep, and say which of its combinations are there already.

    Args:
        whole: the configuration of some combination, Hydra's part included.
        line: the command line.

    Raises:
        InputError: if the folder is somebody else's, or another process runs a sweep there.
    """
    if whole.sweep.objective not in FIGURES:
        raise InputError(f"sweep.objective={whole.sweep.objective}: must be one of {', '.join(FIGURES)}")
    given, sweep_dir = line.gives("hydra.sweep.dir"), Path(str(whole.hydra.sweep.dir))
    if given:
        foreign = [name for name in _WRITES if (sweep_dir / name).exists()]
        notes = sweep_dir / NOTES
        if not notes.is_dir() and foreign:
            raise InputError(
                f"{sweep_dir}: is no folder of a sweep (it has no {NOTES}/), but holds {', '.join(foreign)}, which a "
                "sweep would write; give another hydra.sweep.dir="
            )
        if notes.is_dir() and not all(path.suffix == ".json" or path.name == ".lock" for path in notes.iterdir()):
            raise InputError(f"{notes}: holds files of somebody else; give another hydra.sweep.dir=")
        advice = (
            "wait for the end of that sweep (started again, this one then takes what is complete), or give another "
            "hydra.sweep.dir="
        )
        _kept.enter_context(alone_in(notes, advice))
    searches = any(override.is_sweep_override() and not override.is_discrete_sweep() for override in line.parsed())
    if "BasicSweeper" in str(whole.hydra.sweeper.get("_target_")) and not searches:
        SweepNotes.total = len(line.combinations())
    if whole.sweep.skip_done:
        _announce(find.by_identity(places(sweep_dir, given)), line)


def _announce(there: Dict[str, List[Path]], line: CommandLine) -> None:
    combinations = line.combinations() if there else []
    if len(combinations) > _MOST_LOOKED_AT:
        print(f"lit_glm: sweep: {len(there)} earlier configurations are compared with each combination in its turn")
        return
    for changes, overrides in combinations:
        try:
            config = checked(compose("train", [*overrides, *line.searchpath]), TrainConfig)
        except (InputError, HydraException, OmegaConfBaseException):
            continue  # said when its turn comes
        run = find.best_of(there.get(identity(config), []))
        if run is not None:
            how = "complete, taken from" if is_complete(run) else "goes on in"
            print(f"lit_glm: sweep: {' '.join(changes) or 'the only combination'}: {how} {run}", flush=True)
