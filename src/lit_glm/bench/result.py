"""result.json: one row of the published table and what stands behind it; and that row as text."""

import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

from lit_glm.config.schema import TrainConfig

SCHEMA_VERSION = 1
COLUMNS = ("config", "precision", "fix_hp", "e2e_time", "p_whole", "p_train", "p_core", "acc", "mem")
"""The published table's, in its order (its first column is named 配置 there)."""
COMPLETE = ("success", "finished")
"""States of a run that needs no going on."""


_BLOCK = 4096
"""Bytes that a file takes at least of a disk: what a small file may grow by when the disk is full."""


def write_json(path: Path, content: Dict[str, Any]) -> None:
    """Write a file that is at any moment either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_result(run_dir: Path) -> Optional[Dict[str, Any]]:
    """The result of a run folder; None if there is none or it cannot be read."""
    try:
        content: Dict[str, Any] = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return None


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
    }


def begin_result(run_dir: Path, config: TrainConfig) -> None:
    """Leave a result without figures: a run that dies before its first step has a row too."""
    unmeasured = dict.fromkeys(
        ("e2e_time", "p_whole", "p_train", "p_core", "acc", "mem_actual_gib", "mem_total_gib", "mfu")
    )
    rehearsal = config.hardware.runtime == "simulated"
    row = {"status": "running", **of_config(config), **unmeasured, "converged": False, "simulated": rehearsal}
    write_json(run_dir / "result.json", {**row, "global_steps": 0, "schema_version": SCHEMA_VERSION})


def amend_result(run_dir: Path, **changes: Any) -> None:
    """Change entries of an existing result; on a full disk in the room that it has, and if that fails not at all."""
    result = read_result(run_dir)
    if result is None:
        return
    file = run_dir / "result.json"
    try:
        write_json(file, {**result, **changes})
    except OSError:
        text = (json.dumps({**result, **changes}, indent=1, ensure_ascii=False) + "\n").encode()
        try:
            file.with_name(f".{file.name}.part").unlink()
            if len(text) <= -(-file.stat().st_size // _BLOCK) * _BLOCK:
                with file.open("r+b") as there:
                    there.write(text)
                    there.truncate()
        except OSError:
            pass  # what is to be said of the run's end must not hide it


def cells(result: Dict[str, Any]) -> List[str]:
    """A result in the published formats, one text a column; empty where nothing was measured."""

    def number(name: str, digits: int) -> str:
        return "" if result.get(name) is None else f"{result[name]:.{digits}f}"

    marks = []
    if result.get("simulated"):
        marks.append("simulated")
    if result.get("status") not in COMPLETE:
        marks.append(str(result.get("status")))
    mark = f" ({', '.join(marks)})" if marks else ""
    actual, total = number("mem_actual_gib", 1), number("mem_total_gib", 1)
    return [
        f"{result['hardware']} {result['topology']}{mark}",
        str(result["precision"]),
        str(result["fix_hp"]),
        number("e2e_time", 2),
        number("p_whole", 2),
        number("p_train", 2),
        number("p_core", 2),
        "" if result.get("acc") is None else f"{100 * result['acc']:.2f}%",
        f"{actual}/{total}" if actual and total else "",
    ]


def table(results: List[Dict[str, Any]]) -> str:
    """Results as a Markdown table, columns and order as published."""
    rows = [list(COLUMNS), *(cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
