"""The loader's processes: they live as long as their rank, whatever signals its process group gets."""

import signal
from typing import Any, Iterator

from torch.utils.data import DataLoader

from lit_glm.ending import die_with_parent

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class LoaderProcesses:
    """A loader whose processes leave it to their rank to decide what a signal means."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        # torch's own handler ends a new process until `live_and_die_with_the_rank` has run there; a mask is inherited,
        # so that no signal comes in between. This rank's are only put off.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def live_and_die_with_the_rank(_worker: int) -> None:
    """Ctrl-C and torchrun signal the whole process group; the rank decides what stops, and its processes with it.

    A rank that is killed takes them along: one that waits for a lock of the rank's would never end, and keep its
    output and its run folder's lock.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
