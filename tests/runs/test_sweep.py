"""A sweep runs each combination in a folder of its own, goes on after a failure, and runs nothing twice."""

import csv
import json
from pathlib import Path
from typing import List

from conftest import lit_glm

SWEEP = ["-m", "experiment=debug", "run.max_steps=3", "hydra.sweep.dir=sweep", "logger={}"]


def states(folder: Path) -> List[List[str]]:
    with (folder / "sweep" / "sweep.csv").open() as file:
        return [[row["fix_hp"], row["status"]] for row in csv.DictReader(file)]


def test_a_sweep_and_the_same_again(tmp_path: Path) -> None:
    """One combination asks for more ranks than there are cores: it fails, the others run."""
    first = lit_glm("train", *SWEEP, "bs=2,4", "topology=1x2,4x8", cwd=tmp_path)
    assert first.returncode == 2, first.stderr
    assert states(tmp_path) == [
        ["bs=2,lr=0.001", "finished"],
        ["", "failed"],
        ["bs=4,lr=0.001", "finished"],
        ["", "failed"],
    ]
    assert "topology=4x8 has 4 nodes" in first.stderr
    assert first.stdout.count("cpu 1x2") >= 4  # each run's own row, then the table over all
    results = [tmp_path / "sweep" / number / "result.json" for number in "02"]
    before = [path.read_bytes() for path in results]
    results[1].write_text(json.dumps({**json.loads(before[1]), "status": "running"}))
    again = lit_glm("train", *SWEEP, "bs=2,4", "topology=1x2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("there is nothing to do") == 1
    assert "the run goes on after step 3" in again.stdout
    assert results[0].read_bytes() == before[0]
    assert json.loads(results[1].read_text())["status"] == "finished"
    assert states(tmp_path) == [["bs=2,lr=0.001", "finished"], ["bs=4,lr=0.001", "finished"]]
