"""Wrappers around torch's DataLoader: a prefetch thread, and worker processes that leave signals to their rank."""

import atexit
import queue
import signal
import threading
from typing import Any, Iterable, Iterator

from torch.utils.data import DataLoader

from lit_glm.process_utils import set_parent_death_signal

_LOOK_S = 0.2  # how soon the thread notices that nobody takes any more


class PrefetchIterator:
    """Goes through an iterable in a thread that is at most `depth` items ahead."""

    def __init__(self, source: Iterable[Any], depth: int = 2) -> None:
        """Wrap `source`; each iteration starts it anew."""
        self._source, self._depth = source, depth

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue[Any] = queue.Queue(self._depth)
        over = threading.Event()

        def hand_over(kind: str, item: Any) -> None:
            while not over.is_set():
                try:
                    ready.put((kind, item), timeout=_LOOK_S)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for item in self._source:
                    hand_over("item", item)
                    if over.is_set():
                        return
                hand_over("end", None)
            except BaseException as error:  # raised where the item would have been taken
                hand_over("error", error)

        thread = threading.Thread(target=work, name="batches ahead", daemon=True)

        def close() -> None:
            over.set()
            thread.join()

        thread.start()
        atexit.register(close)  # a thread that is inside torch when the interpreter goes takes the process with it
        try:
            while True:
                kind, item = ready.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise item
                yield item
        finally:
            close()
            atexit.unregister(close)


_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class SignalSafeDataLoader:
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


def worker_init_fn(_worker: int) -> None:
    """Ctrl-C and torchrun signal the whole process group; the rank decides what stops, and its processes with it.

    A rank that is killed takes them along: one that waits for a lock of the rank's would never end, and keep its
    output and its run folder's lock.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    set_parent_death_signal()
