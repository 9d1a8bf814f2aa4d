"""How far off are the plan's predictions on this machine? From one run at bs 4, other batch sizes and depths.

    python benchmarks/plan.py [--hidden 512] [--news FOLDER]

Each row is a run of its own, measured behind its first steps and scaled to the work of its average step, beside what
`plan` says of it from the run at bs 4 with 4 layers: the middle of the predicted range (its geometric mean) over what
was measured. --news: a folder that `prepare` has filled, for real lengths; else generated examples.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from lit_glm.data.memmap_dataset import open_dataset
from lit_glm.planning.workload import Workload
from lit_glm.runs.job_spec import JobSpec


def command(name: str, overrides: List[str]) -> str:
    """Run a command; its output."""
    done = subprocess.run([sys.executable, "-m", f"lit_glm.{name}", *overrides], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measured(folder: Path, overrides: List[str]) -> Dict[str, float]:
    """Seconds a step and memory of a run."""
    command("train", [*overrides, f"hydra.run.dir={folder}"])
    with (folder / "steps.csv").open() as file:
        steps = [float(row["step_s"]) for row in csv.DictReader(file)]
    first = max(3, len(steps) // 10)
    result, config = json.loads((folder / "result.json").read_text()), JobSpec.read(folder).config
    split = open_dataset(config.data.train_file, False, config.data.cache_dir)
    flops = Workload(config, split, None).counter.flops_per_step(len(steps))
    # The longest examples come first, so that those which are left out have more work than a step has on average.
    average = statistics.mean(steps[first:]) * flops.mean() / flops[first:].mean()
    return {"step_s": average, "memory_gib": result["mem_actual_gib"]}


def middle(pair: List[float]) -> float:
    """Of a range."""
    return float((pair[0] * pair[1]) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--examples", type=int, default=352, help="each run takes so many: an epoch of the news")
    parser.add_argument("--news")
    parser.add_argument("--bs", default="1,2,8,16,32")
    parser.add_argument("--layers", default="2,8")
    given = parser.parse_args()
    shape = ["model=glm_base", f"model.hidden_size={given.hidden}", f"model.num_attention_heads={given.hidden // 64}"]
    limits = ["run.evaluate=false", "data.longest_first=true", "run.checkpoint_interval_steps=100000"]
    data = [f"data.out_dir={given.news}"] if given.news else ["data=synthetic", "data.synthetic.num_train=4000"]
    held = [] if given.news else ["data.synthetic.num_eval=8"]
    common = ["hardware=cpu", *shape, *limits, *data, *held, "model.init_std=0.02"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base = place / "base"
        cases = [(4, 4), *((int(bs), 4) for bs in given.bs.split(",")), *((4, int(n)) for n in given.layers.split(","))]
        head = "| bs | layers | step s: measured | predicted | ratio | GiB: measured | predicted | ratio |"
        print(head + "\n" + "|---" * 8 + "|")
        for bs, layers in cases:
            steps = max(8, given.examples // bs)
            overrides = [*common, f"bs={bs}", f"run.max_steps={steps}", f"model.num_layers={layers}"]
            real = measured(base if (bs, layers) == (4, 4) else place / f"{bs}_{layers}", overrides)
            plan_overrides = [f"plan.runs={base}", "plan.device_counts=[1]", f"hydra.run.dir={place}/plan", "--json"]
            guess: Any = json.loads(command("plan", [*overrides, *plan_overrides]))[0]
            cells = []
            for key, digits in (("step_s", 3), ("memory_gib", 2)):
                low, high = guess[key]
                cells += [f"{real[key]:.{digits}f}", f"{low:.{digits}f}-{high:.{digits}f}"]
                cells.append(f"{middle(guess[key]) / real[key]:.2f}")
            print(f"| {bs} | {layers} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
