"""How long until something happens: `--help`, and from the command to the first training step of a quickstart?

    python benchmarks/startup.py --rounds 5

Whole processes, the data made beforehand by a first round that does not count.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

PLAIN = "import lit_glm.launch.rank_runner"
FAST = (
    "from lit_glm.config.schema import TrainConfig\nfrom lit_glm.process_utils import fast_imports\n"
    f"with fast_imports(TrainConfig()):\n    {PLAIN}"
)


def until_exit(command: List[str]) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def until_first_step() -> float:
    """Seconds until steps.csv has its first line."""
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.csv"
        command = [sys.executable, "-m", "lit_glm.train", "experiment=quickstart", f"hydra.run.dir={folder}"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (steps.exists() and steps.read_bytes().count(b"\n") > 1):
            assert process.poll() is None
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    until_first_step()
    module = [sys.executable, "-m"]
    for name, measure in (
        ("train --help", lambda: until_exit([*module, "lit_glm.train", "--help"])),
        ("train --cfg job", lambda: until_exit([*module, "lit_glm.train", "--cfg", "job"])),
        ("report --help", lambda: until_exit([*module, "lit_glm.report", "--help"])),
        ("doctor experiment=quickstart", lambda: until_exit([*module, "lit_glm.doctor", "experiment=quickstart"])),
        ("imports of a rank", lambda: until_exit([sys.executable, "-c", FAST])),
        ("the same without fast_imports", lambda: until_exit([sys.executable, "-c", PLAIN])),
        ("first step of a quickstart", until_first_step),
    ):
        seconds = [measure() for _ in range(rounds)]
        print(
            f"{name}: median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", flush=True
        )


if __name__ == "__main__":
    main()
