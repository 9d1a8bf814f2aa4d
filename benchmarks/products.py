"""Which of torch's libraries multiplies fp32 matrices faster on this processor: its default, or oneDNN?

A linear layer of GLM-Large, forward and backward, both ways in turn; `lit_glm.hardware.runtimes.cpu_ops` decides by the
processor's maker and by the size from which it pays.

    python benchmarks/products.py --rounds 9
"""

import argparse
import statistics
import time
from typing import Any

import torch

from lit_glm.hardware.runtimes import cpu_ops
from lit_glm.metrics.system_info import describe_machine


def seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"oneDNN preferred here: {cpu_ops.PREFERS_ONEDNN}")
    print("| rows, in, out | multiply-adds | default ms | oneDNN ms | default / oneDNN |\n|---|---|---|---|---|")
    shapes = [(64, 64, 64), (400, 64, 256), (1600, 64, 256), (300, 512, 2048), (2700, 512, 2048), (2700, 1024, 4096)]
    for rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, requires_grad=True)
        weight, bias = torch.randn(outputs, inputs, requires_grad=True), torch.randn(outputs, requires_grad=True)
        grad = torch.randn(rows, outputs)
        ways = (torch.nn.functional.linear, cpu_ops._OneDNNLinear.apply)
        times = [[seconds(lambda: way(x, weight, bias).backward(grad)) for way in ways] for _ in range(rounds)]  # noqa: B023
        default, other = (statistics.median(column) for column in zip(*times))
        ratio = statistics.median(pair[0] / pair[1] for pair in times)
        size = f"{rows * inputs * outputs / 1e6:.1f} M"
        print(f"| {rows}, {inputs}, {outputs} | {size} | {1000 * default:.2f} | {1000 * other:.2f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
