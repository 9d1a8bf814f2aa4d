"""What do Lightning, callbacks, logging and data add to a step, over a bare torch loop?

`train` itself is run, with a clock around the six calls that a bare loop has: scores, loss, backward, clipping, AdamW,
zero_grad. What a step (step_s in steps.csv) takes beyond them and beyond waiting for data is what is added, step by
step in one process: two processes of the same loop differ by more than that on a shared machine. Given as medians after
the first fifth, inside of compute_s and beside it. A step of glm_tiny is not much longer than what is added; its share
is what counts at GLM-Large: --large measures a step of that shape, and the share that the same milliseconds have of it.

    python benchmarks/overhead.py --bs 4,64 --steps 300 --rounds 3 --large
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

OVERRIDES = ["experiment=quickstart", "run.evaluate=false"]


def clocked(owner: Any, name: str, seconds: List[float], begins: bool = False) -> None:
    """Put a clock around a function: what its calls take is added to the newest entry, or begins one."""
    function = getattr(owner, name)

    def timed(*arguments: Any, **more: Any) -> Any:
        start = time.perf_counter()
        out = function(*arguments, **more)
        elapsed = time.perf_counter() - start
        if begins:
            seconds.append(elapsed)
        elif seconds:  # what is tried before training, an update of four numbers say, is no step
            seconds[-1] += elapsed
        return out

    setattr(owner, name, timed)


def measure(overrides: List[str]) -> None:
    """Run `train` with the clocks, and print what they say of each training step."""
    from lit_glm import train

    seconds: List[float] = []
    sys.argv = ["lit_glm.train", *overrides]
    from lit_glm.openmp import limit_spinning

    limit_spinning()  # before torch, as `train` does for itself
    import torch

    from lit_glm.training import module

    clocked(module, "candidate_scores", seconds, begins=True)
    clocked(module, "candidate_loss", seconds)
    clocked(torch.Tensor, "backward", seconds)
    clocked(module, "clip_gradients", seconds)
    clocked(torch.optim.AdamW, "step", seconds)
    clocked(torch.optim.AdamW, "zero_grad", seconds)
    status = train.main()
    print(json.dumps(seconds))
    sys.exit(status)


def run(bs: str, steps: int, more: List[str]) -> Dict[str, List[float]]:
    """Milliseconds of each step behind the first fifth: whole, of a bare loop's calls, and what is added where."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"bs={bs}", f"run.max_steps={steps}", f"hydra.run.dir={folder}/run", *more]
        command = [sys.executable, __file__, "--measure", *OVERRIDES, *overrides]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        bare: List[float] = json.loads(shown.splitlines()[-1])
        with (Path(folder) / "run" / "steps.csv").open() as file:
            rows = list(csv.DictReader(file))
    assert len(bare) == len(rows) == steps
    step, compute, data = ([float(row[name]) for row in rows] for name in ("step_s", "compute_s", "data_s"))
    times = {
        "whole": step,
        "bare": bare,
        "inside": [computing - plain for computing, plain in zip(compute, bare)],
        "beside": [total - computing - waited for total, computing, waited in zip(step, compute, data)],
    }
    times["added"] = [a + b for a, b in zip(times["inside"], times["beside"])]
    return {name: [1000 * value for value in values[steps // 5 :]] for name, values in times.items()}


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bs", default="4,64")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="a step of GLM-Large too (needs 8 GiB)")
    given = parser.parse_args()
    print("| bs | step ms | bare loop's calls ms | added ms (of each round) | of it inside compute | beside |")
    print("|---|---|---|---|---|---|")
    added: List[float] = []
    for bs in given.bs.split(","):
        rounds = [run(bs, given.steps, []) for _ in range(given.rounds)]
        over = [statistics.median(times["added"]) for times in rounds]
        added += over
        step_ms, bare, inside, beside = (
            statistics.median(statistics.median(times[name]) for times in rounds)
            for name in ("whole", "bare", "inside", "beside")
        )
        all_rounds, middle = ", ".join(f"{value:.2f}" for value in over), statistics.median(over)
        print(
            f"| {bs} | {step_ms:.2f} | {bare:.2f} | {middle:.2f} ({all_rounds}) | {inside:.2f} | {beside:.2f} |",
            flush=True,
        )
    if given.large:
        shape = ["model=glm_large", "model.vocab_size=1024", "model.init_std=0.02"]
        step = statistics.median(run("4", 6, shape)["whole"])
        share = statistics.median(added) / step
        print(f"a step of 24 layers x 1024 (vocabulary 1024), bs 4: {step / 1000:.2f} s; added to it: {share:.3%}")


if __name__ == "__main__":
    main()
