"""Pause of the garbage collector while torch and Lightning are imported; it takes a sixth of the import time.

Module objects live until the process exits. Python's collector scans them repeatedly while their number grows, and at
every full collection afterwards, also during training steps.
"""

import gc
import sys
from contextlib import contextmanager
from typing import Iterator

_LARGE = 100
"""Minimum number of modules that a large library imports."""


@contextmanager
def paused_gc() -> Iterator[None]:
    """Disable the collector inside the block; freeze the existing objects afterwards if much was imported."""
    before, was_on = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before + _LARGE:
            gc.freeze()
        if was_on:
            gc.enable()
