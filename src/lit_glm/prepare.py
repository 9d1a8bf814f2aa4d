"""`python -m lit_glm.prepare`: convert raw ReCoRD to the HDF5 files that `train` reads."""

import logging
import sys
from pathlib import Path
from typing import Any

from lit_glm.config.hydra_main import run_command
from lit_glm.config.schema import PrepareConfig
from lit_glm.errors import InputError

log = logging.getLogger("lit_glm.prepare")


def prepare(config: PrepareConfig, _composed: Any) -> int:
    """Run the conversion and print the result of each file."""
    data = config.data
    if data.name == "synthetic":
        from lit_glm.data.synthetic import ensure_synthetic_data

        ensure_synthetic_data(data)
        print(f"{data.train_file}\n{data.eval_file}")
        return 0
    if data.raw_dir is None or data.vocab_file is None:
        missing = "vocab_file" if data.raw_dir else "raw_dir"
        usage = "data.raw_dir=DIR data.vocab_file=FILE data.out_dir=DIR"
        raise InputError(f"data.{missing} is not set: python -m lit_glm.prepare {usage}")
    from lit_glm.data.prepare_hdf5 import prepare_files
    from lit_glm.preflight import check_vocabulary

    if Path(data.vocab_file).is_file():
        log.info(f"{check_vocabulary(Path(data.vocab_file))[1]}")
    raw_dir, out_dir = Path(data.raw_dir), Path(data.out_dir)
    for built in prepare_files(raw_dir, out_dir, data.vocab_file, data.max_seq_length, data.num_workers):
        print(built.report())
    return 0


def main() -> int:
    """Run the command and return the exit status."""
    return run_command("prepare", PrepareConfig, prepare)


if __name__ == "__main__":
    sys.exit(main())
