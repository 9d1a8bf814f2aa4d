"""The processor's runtime: what it sets for the whole process."""

import subprocess
import sys

CODE = """
import torch
from lit_glm.hardware.runtimes.cpu import CPURuntime
torch.set_num_threads(2)
CPURuntime()
few, many = torch.full((4,), 1e-30), torch.full((2**20,), 1e-30)
print(float((few * 1e-10).abs().max()), float((many * 1e-10).abs().max()), float(few.max()))
"""


def test_numbers_too_small_to_be_normal_are_zero_in_all_threads() -> None:
    """Else products of the gradients of a choice that is all but certain take thirty times as long."""
    done = subprocess.run([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True, check=True)
    few, many, plain = map(float, done.stdout.split())
    assert (few, many) == (0.0, 0.0)
    assert plain > 0
