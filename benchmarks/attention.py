"""Which way of attending is ahead: a call a group (FlatPlan) or all groups in one padded call (PaddedPlan)?

Prints the median ratio of the two, forward and backward of one layer's attention, measured in turn in one process.

    python benchmarks/attention.py
"""

import argparse
import statistics
import time
from typing import Any, List

import numpy as np
import torch

from lit_glm.data.collate import build_padding_index
from lit_glm.model.attention import DotProductAttention, PaddedAttention, PerGroupAttention


def lengths(groups: int, context: int, candidates: int, tokens: int) -> "tuple[List[int], List[int], torch.Tensor]":
    """Contexts between 80 and 100 % of `context` rows, the same candidates everywhere."""
    contexts = [int(context * (0.8 + 0.2 * (g % 5) / 4)) for g in range(groups)]
    owner = torch.arange(groups * candidates).repeat_interleave(tokens)
    return contexts, [candidates * tokens] * groups, owner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio = call a group / one padded call")
    print(f"{'width':>6} {'heads':>6} {'groups':>7} {'context':>8} {'rows x width':>13} {'ratio':>7}")
    for width, heads in ((64, 4), (256, 8), (1024, 16)):
        for groups, context in ((64, 25), (16, 100), (8, 300)):
            contexts, rows, owner = lengths(groups, context, 8, 3)
            places = build_padding_index(np.array(contexts), np.array(rows), owner.numpy())
            plans: List[Any] = [
                PerGroupAttention(contexts, rows, owner, DotProductAttention()),
                PaddedAttention.from_index(places, DotProductAttention()),
            ]
            qkv = torch.randn(sum(contexts) + sum(rows), 3 * width, requires_grad=True)
            ratios = []
            for _ in range(rounds):
                seconds = []
                for plan in plans:
                    start = time.perf_counter()
                    plan(qkv, heads, 0.0, False).sum().backward()
                    seconds.append(time.perf_counter() - start)
                ratios.append(seconds[0] / seconds[1])
            size = (max(contexts) + rows[0]) * width
            print(f"{width:6} {heads:6} {groups:7} {context:8} {size:13} {statistics.median(ratios):7.2f}")


if __name__ == "__main__":
    main()
