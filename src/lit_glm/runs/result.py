"""result.json: how a run stands and ended, with its figures; from the first moment on, so that every run has a row."""

import json
from pathlib import Path
from typing import Any, Dict, Optional

from lit_glm.config.schema import TrainConfig
from lit_glm.files import write_json

FILE = "result.json"
SCHEMA_VERSION = 2
COMPLETE = ("success", "finished")
"""States of a run that needs no going on."""
_ROOM = ".room"
_ROOM_BYTES = 2**16
"""Kept free beside a result while its run goes on: how it ended must find room on a disk that has become full."""


def read_result(run_dir: Path) -> Optional[Dict[str, Any]]:
    """The result of a run folder; None if there is none or it cannot be read."""
    try:
        content: Dict[str, Any] = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return None


def is_complete(run_dir: Path) -> bool:
    """Whether a run folder holds a run that needs no going on."""
    return (read_result(run_dir) or {}).get("status") in COMPLETE


def of_config(config: TrainConfig) -> Dict[str, Any]:
    """What a result says of its configuration."""
    return {
        "hardware": config.hardware.name,
        "topology": config.topology.name,
        "precision": config.precision.name,
        "scoring": config.scoring.name,
        "fix_hp": config.fix_hp,
        "bs": config.bs,
        "lr": config.lr,
        "seed": config.seed,
        "model": config.model.name,
        "gelu": config.model.gelu,
        "tuned_for": config.tuned_for,
        "profiled": config.profiled,
    }


def begin_result(run_dir: Path, config: TrainConfig) -> None:
    """Leave a result without figures: a run that dies before its first step has a row too."""
    unmeasured = dict.fromkeys(
        ("e2e_time", "p_whole", "p_train", "p_core", "acc", "mem_actual_gib", "mem_total_gib", "mfu")
    )
    rehearsal = config.hardware.runtime == "simulated"
    row = {"status": "running", **of_config(config), **unmeasured, "converged": False, "simulated": rehearsal}
    write_json(run_dir / FILE, {**row, "global_steps": 0, "schema_version": SCHEMA_VERSION})


def keep_room(run_dir: Path) -> None:
    """Take the room that the end of a run needs."""
    (run_dir / _ROOM).write_bytes(b"\0" * _ROOM_BYTES)


def give_room(run_dir: Path) -> None:
    """Give it back."""
    try:
        (run_dir / _ROOM).unlink()
    except OSError:
        pass


def amend_result(run_dir: Path, **changes: Any) -> None:
    """Change entries of an existing result; what cannot be written must not hide how the run ended."""
    result = read_result(run_dir)
    if result is None:
        return
    for _ in range(2):
        try:
            write_json(run_dir / FILE, {**result, **changes})
            return
        except OSError:
            give_room(run_dir)


def fail(run_dir: Path, reason: str) -> None:
    """Say in the result that the run failed, unless it ended well."""
    if not is_complete(run_dir):
        amend_result(run_dir, status="failed", error=reason)
