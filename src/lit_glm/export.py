"""`python -m lit_glm.export RUN_DIR --to published|safetensors --out FILE`: write the fine-tuned weights of a run."""

import logging
import shutil
import sys
from pathlib import Path
from typing import List, Optional

from lit_glm.console import CommandParser, set_up_console
from lit_glm.errors import InputError, RunError, first_line
from lit_glm.launch.signals import run_interruptible

log = logging.getLogger("lit_glm.export")


def export(run_dir: Path, layout: str, out: Path) -> str:
    """Write the weights of a run's newest readable checkpoint; log newer ones that are skipped.

    Args:
        run_dir: a run folder.
        layout: published or safetensors.
        out: the file; written atomically.

    Returns:
        A message about what was written.

    Raises:
        InputError: if the folder holds no usable checkpoint or the file cannot be written.
        RunError: if the disk is full.
    """
    from lit_glm.atomic_files import atomic_write
    from lit_glm.model.checkpoint import is_exported, save_published, save_safetensors
    from lit_glm.runs import checkpoints
    from lit_glm.runs.job_spec import JOB_FILE, read_job_json

    if layout == "published" and out.suffix == ".safetensors":  # torch reads a file of that name as safetensors
        raise InputError(f"--out {out}: the published layout is a torch file; write --to safetensors, or FILE.pt")
    if not (run_dir / JOB_FILE).is_file():
        raise InputError(f"{run_dir}: is not a run folder (no {JOB_FILE})")
    stored_hash = str((read_job_json(run_dir) or {}).get("config_hash"))  # as computed by the version that wrote them
    path, content, skipped = checkpoints.latest_valid(run_dir, stored_hash)
    if path is None:
        raise InputError("\n".join([f"{run_dir}: contains no usable checkpoint", *skipped]))
    for line in skipped:
        log.warning(line)
    if out.exists() and not is_exported(out):
        raise InputError(f"--out {out}: exists and was not written by export; give another file, or remove it")
    weights = {name[len("glm.") :]: tensor for name, tensor in content["state_dict"].items()}
    step = content["lit_glm"]["steps_done"]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as temporary:
            if layout == "published":
                save_published(weights, temporary, step)
            else:
                save_safetensors(weights, temporary)
    except Exception as error:  # torch and safetensors raise errors of their own, which may hide the cause
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        usage = shutil.disk_usage(str(out.parent)) if out.parent.is_dir() else None
        if usage is not None and usage.free < min(size, usage.total):  # /proc has no space at all
            message = f"--out {out}: cannot be written: less than {size / 2**20:.0f} MiB are free on this disk"
            raise RunError(message) from error
        raise InputError(f"--out {out}: cannot be written ({first_line(error)})") from error
    count = sum(tensor.numel() for tensor in weights.values())
    return f"{out}: {len(weights)} tensors, {count} parameters, after step {step}"


def main(arguments: Optional[List[str]] = None) -> int:
    """Parse the arguments and export; return the exit status."""
    parser = CommandParser(
        "lit_glm.export",
        "Write the fine-tuned weights of a run.\n\n  python -m lit_glm.export outputs/RUN --to published --out glm.pt",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder of train")
    parser.add_argument("--to", required=True, choices=("published", "safetensors"), help="layout of the file")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    args = parser.parse_args(arguments)
    set_up_console()

    def write() -> int:
        print(export(args.run_dir, args.to, args.out))
        return 0

    return run_interruptible(write)


if __name__ == "__main__":
    sys.exit(main())
