"""verify.json: results of a verification, and search for the newest one that applies to a run."""

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
_DEPTHS = ("", "*/", "*/*/")  # outputs/verify/DATE/TIME, and shallower ones set with hydra.run.dir
_ABOVE = 6  # levels above a run at which outputs/ is searched


def write_verification(
    folder: Path, device: Dict[str, Any], checks: List[CheckResult], precisions: Dict[str, bool], complete: bool = True
) -> Dict[str, Any]:
    """Write and return the results of a verification so far.

    Args:
        folder: folder of verify.json.
        device: hardware, runtime, driver and similar fields.
        checks: all results.
        precisions: whether all checks of a precision passed, for each precision that was tested.
        complete: whether all checks have finished.
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
    """Return the newest verification, passed or failed, of a hardware, driver and precision; None without one.

    Verifications of simulated devices do not count.

    Args:
        starts: folders at and above which `outputs/verify` is searched: the run folder, and the working directory.
        hardware: name of the hardware file.
        driver: version of the device driver; None if there is none.
        precision: name of the precision.
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
