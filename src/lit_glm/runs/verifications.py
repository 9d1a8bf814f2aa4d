"""verify.json: what a verification found, and the newest one that fits a run."""

import json
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional

from lit_glm.atomic_files import make_folder, write_json
from lit_glm.check_result import CheckResult

VERIFY_FILE = "verify.json"
FOLDER = "verify"
_SCHEMA_VERSION = 1
_KEYS = ("name", "status", "message", "value", "bound", "advice")
_DEPTHS = ("", "*/", "*/*/")  # outputs/verify/DATE/TIME, and shallower ones that hydra.run.dir named
_ABOVE = 6  # folders above a run in which outputs/ may be


def write_verification(
    folder: Path, device: Dict[str, Any], checks: List[CheckResult], precisions: Dict[str, bool], complete: bool = True
) -> Dict[str, Any]:
    """Write what a verification has found so far.

    Args:
        folder: where.
        device: hardware, runtime, driver and the like.
        checks: all lines.
        precisions: whether all that belongs to a precision passed; those that were not tried are not in it.
        complete: whether all checks have ended.
    """
    content = {
        "schema_version": _SCHEMA_VERSION,
        "complete": complete,
        "ok": not any(check.status == "fail" for check in checks),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        **device,
        "precisions": precisions,
        "checks": [{key: getattr(check, key) for key in _KEYS} for check in checks],
    }
    make_folder(folder)
    write_json(folder / VERIFY_FILE, content)
    return content


def _search_dirs(starts: Iterable[Path]) -> Iterator[Path]:
    for start in starts:
        for folder in [start, *list(start.resolve().parents)[:_ABOVE]]:
            yield folder / "outputs" / FOLDER
            yield folder / FOLDER


def latest_verification(
    starts: Iterable[Path], hardware: str, driver: Optional[str], precision: str
) -> Optional[Dict[str, Any]]:
    """The newest verification of the same hardware, driver and precision, failed ones too; None without one.

    Of pretended cards none counts.

    Args:
        starts: folders at and above which `outputs/verify` is looked for: a run's, and the one that one works in.
        hardware: name of the hardware file.
        driver: version of the cards' driver; None where there is none.
        precision: its name.
    """
    found = []
    for place in dict.fromkeys(_search_dirs(starts)):
        for file in (file for depth in _DEPTHS for file in place.glob(f"{depth}{VERIFY_FILE}")):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            fits = isinstance(content, dict) and (content.get("hardware"), content.get("driver")) == (hardware, driver)
            if fits and not content.get("simulated") and precision in (content.get("precisions") or {}):
                found.append({**content, "file": str(file), "passed": bool(content["precisions"][precision])})
    return max(found, key=lambda content: str(content.get("finished")), default=None)
