"""A function elsewhere: its result, its refusal, its progress; and its death is said, not shared."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import h5py
import numpy as np
import psutil
import pytest

from conftest import EVAL_FILE, TRAIN_FILE
from isolated_functions import adds, crashes, process_id, raises_disk_full, raises_key_error, refuses
from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.errors import InputError
from lit_glm.isolated_process import call_isolated, share_isolated_process


def test_a_result_and_progress() -> None:
    told: List[Any] = []
    assert call_isolated(adds, 2, 3, progress=lambda done, total: told.append((done, total))) == 5
    assert told == [(1, 2)]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (refuses, "^a.hdf5: no$"),
        (raises_key_error, "a.hdf5: damaged, or not a file of this kind .KeyError: 'chalk'."),
        (crashes, "a.hdf5: the process that read it was killed by SIGSEGV: the file is damaged"),
    ],
)
def test_isolated_call_errors_are_reported(function: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call_isolated(function, "a.hdf5")


def test_calls_share_a_process_until_one_fails() -> None:
    with share_isolated_process():
        first = call_isolated(process_id, "a.hdf5")
        with share_isolated_process():
            assert call_isolated(process_id, "b.hdf5") == first
        assert call_isolated(process_id, "c.hdf5") == first
        with pytest.raises(InputError):
            call_isolated(crashes, "d.hdf5")
        second = call_isolated(process_id, "e.hdf5")
    assert len({first, second, os.getpid()}) == 3
    assert not any(map(psutil.pid_exists, (first, second)))


@pytest.mark.parametrize("module", ["data.memmap_dataset"])
def test_isolated_modules_do_not_import_torch_or_hydra(module: str) -> None:
    """Each file that is looked at costs a process: half a second with numpy and h5py, three with torch."""
    code = f"import sys, lit_glm.{module}; print({{'torch', 'hydra', 'omegaconf'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_full_disk_is_not_reported_as_damaged_file() -> None:
    with pytest.raises(OSError, match="No space left"):
        call_isolated(raises_disk_full, "a.hdf5")


@pytest.mark.parametrize("seed", range(12))
def test_damaged_hdf5_file_is_rejected_or_read(seed: int, tmp_path: Path) -> None:
    """A few bytes changed: whatever the library makes of it, this process lives and says which file it is."""
    source = (TRAIN_FILE, EVAL_FILE)[seed % 2]
    content = bytearray(source.read_bytes())
    generator = np.random.RandomState(seed)
    for place in generator.randint(0, len(content), 12):
        content[place] = generator.randint(256)
    damaged = tmp_path / "damaged.hdf5"
    damaged.write_bytes(bytes(content))
    said = ""
    try:
        open_dataset(damaged, seed % 2 == 1, None)
    except InputError as error:
        said = str(error)
    assert said == "" or str(damaged) in said


def test_hdf5_file_of_another_format_is_rejected(tmp_path: Path) -> None:
    other = tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["text"] = np.zeros(3)
    with pytest.raises(InputError, match=f"{other}: group text is not a sparse matrix"):
        open_dataset(other, False, None)
    assert os.path.getsize(other) > 0
