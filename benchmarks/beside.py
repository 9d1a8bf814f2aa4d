"""How long does a step of the quickstart take beside other work?

In one run and in turn: alone, beside a process that keeps one core busy, beside a twin of itself; with the threads and
the waiting that `train` chooses, with one thread, with threads that sleep at once (OMP_WAIT_POLICY=PASSIVE), and with
the OpenMP library's own waiting. Median and mean of step_s after the first fifth, in ms.

    python benchmarks/beside.py --steps 200 --rounds 2
    python benchmarks/beside.py --python .venv-seed/bin/python --ways chosen
    python benchmarks/beside.py --ways chosen --overrides topology=1x2
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

WAYS = {
    "chosen": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "unbounded": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},  # the libraries' own values
}
BUSY = [sys.executable, "-c", "while True: pass"]


def start(python: str, folder: Path, steps: int, variables: Dict[str, str], more: List[str]) -> "subprocess.Popen[str]":
    """A quickstart without evaluations, in a process of its own."""
    rare = ["run.eval_interval_samples=100000000", "run.eval_start_samples=100000000"]
    overrides = [
        f"run.max_steps={steps}",
        f"hydra.run.dir={folder}",
        f"data.out_dir={folder.parent}/data",
        *rare,
        *more,
    ]
    command = [python, "-m", "lit_glm.train", "experiment=quickstart", *overrides]
    return subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, text=True)


def steps_of(folder: Path) -> List[float]:
    """Milliseconds of the steps after the first fifth."""
    with (folder / "steps.csv").open() as file:
        seconds = [float(row["step_s"]) for row in csv.DictReader(file)]
    return [1000 * value for value in seconds[len(seconds) // 5 :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--overrides", nargs="*", default=[])
    given = parser.parse_args()
    step_times: Dict[str, Dict[str, List[List[float]]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number in range(given.rounds):
            for way in given.ways.split(","):
                for condition in ("alone", "busy", "twin"):
                    folder = Path(place) / f"{way.replace(' ', '')}-{condition}-{number}"
                    arguments = (given.steps, WAYS[way], given.overrides)
                    busy = subprocess.Popen(BUSY) if condition == "busy" else None
                    runs = [start(given.python, folder, *arguments)]
                    if condition == "twin":
                        runs.append(start(given.python, folder.with_name(folder.name + "-twin"), *arguments))
                    if any(run.wait() for run in runs):
                        raise SystemExit(f"a run failed: {way}, {condition}")
                    if busy is not None:
                        busy.kill()
                    step_times.setdefault(way, {}).setdefault(condition, []).append(steps_of(folder))
    print("| threads | alone ms: median, mean | beside a busy process | beside a twin | over alone: busy, twin |")
    print("|---|---|---|---|---|")
    for way, places in step_times.items():
        middle = {condition: statistics.median(map(statistics.median, rounds)) for condition, rounds in places.items()}
        mean = {condition: statistics.median(map(statistics.fmean, rounds)) for condition, rounds in places.items()}
        cells = [f"{middle[condition]:.1f}, {mean[condition]:.1f}" for condition in ("alone", "busy", "twin")]
        over = [f"{middle[condition] / middle['alone']:.2f}" for condition in ("busy", "twin")]
        print(f"| {way} | {' | '.join(cells)} | {', '.join(over)} |", flush=True)


if __name__ == "__main__":
    main()
