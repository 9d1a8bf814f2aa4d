"""Finds the run that should go on, and refuses to go on under another configuration."""

import os
from pathlib import Path
from typing import Iterator, List, Optional

from lit_glm.alone import is_running
from lit_glm.bench.result import COMPLETE, read_result
from lit_glm.config.schema import TrainConfig
from lit_glm.errors import InputError
from lit_glm.jobs.spec import FILE, Job, identity, settings


def resolve(resume: str, config: TrainConfig, run_dir: Path) -> Optional[Path]:
    """The run folder that `run.resume` means.

    Args:
        resume: a run folder, or auto.
        config: of the command line.
        run_dir: where a new run would go; runs beside it are looked at too.

    Returns:
        The folder; None if `auto` finds none, and a new run is to be started.

    Raises:
        InputError: if the folder is no run folder.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / FILE).is_file():
            raise InputError(f"run.resume={resume}: is no run folder (it has no {FILE})")
        return folder
    runs = runs_of(identity(config), run_dir)
    unfinished = [
        folder
        for folder in runs
        if (read_result(folder) or {}).get("status") not in COMPLETE and not is_running(folder)
    ]
    return max(unfinished, key=lambda folder: (folder / FILE).stat().st_mtime, default=None)


def runs_of(wanted: str, run_dir: Path) -> List[Path]:
    """Run folders of a configuration, near a run folder."""
    return [folder for folder in _run_folders(run_dir) if _identity_of(folder) == wanted]


def check_same(config: TrainConfig, run_dir: Path) -> None:
    """Refuse to go on under a changed configuration.

    Raises:
        InputError: names the keys that differ, with both values.
    """
    before, now = settings(Job.read(run_dir).config), settings(config)
    differing = [
        f"{key}: {before.get(key)} there, {now.get(key)} here"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise InputError(
            f"run.resume={run_dir}: the run was started under another configuration:\n  " + "\n  ".join(differing)
        )


def _identity_of(folder: Path) -> Optional[str]:
    try:
        return identity(Job.read(folder).config)
    except Exception:  # written by another version, or torn: not a run that can go on
        return None


def _run_folders(run_dir: Path) -> Iterator[Path]:
    """Run folders near a run folder: itself, its siblings, and all below outputs/ and multirun/."""
    seen: List[Path] = []
    places = [
        (run_dir, 0),
        (run_dir.parent, 1),
        (run_dir.parent.parent, 2),
        (Path("outputs"), 3),
        (Path("multirun"), 3),
    ]
    for place, depth in places:
        for root, folders, files in os.walk(place):
            if FILE in files and Path(root).resolve() not in seen:
                seen.append(Path(root).resolve())
                yield Path(root)
            folders[:] = [name for name in folders if name != "nodes"]  # jobs of a run's further nodes
            if len(Path(root).relative_to(place).parts) >= depth or FILE in files:
                folders.clear()
