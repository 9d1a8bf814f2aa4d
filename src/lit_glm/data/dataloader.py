"""Wrappers around torch's DataLoader: a prefetch thread, and worker processes that leave signals to their rank."""

import atexit
import queue
import signal
import threading
from typing import Any, Iterable, Iterator

from torch.utils.data import DataLoader

from lit_glm.process_utils import set_parent_death_signal

_LOOK_S = 0.2  # how soon the thread notices that the consumer has stopped


class PrefetchIterator:
    """Iterable that prefetches up to `depth` items in a background thread."""

    def __init__(self, source: Iterable[Any], depth: int = 2) -> None:
        """Wrap `source`; each iteration restarts it."""
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
            except BaseException as error:  # raised again in the consumer
                hand_over("error", error)

        thread = threading.Thread(target=work, name="batches ahead", daemon=True)

        def close() -> None:
            over.set()
            thread.join()

        thread.start()
        atexit.register(close)  # a thread inside torch at interpreter exit crashes the process
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
    """DataLoader wrapper whose workers ignore stop signals; their rank decides how to react to them."""

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        # Until `worker_init_fn` has run, torch's own handler ends a new worker on a signal. Workers inherit the blocked
        # mask, so that no signal arrives in between. This rank's signals are only delayed.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_init_fn(_worker: int) -> None:
    """Ignore stop signals in a worker, and end it with its rank.

    Ctrl-C and torchrun signal the whole process group, but the rank decides when to stop. Without its killed rank, a
    worker could wait for a lock of that rank forever, and keep its output and the lock of its run folder.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    set_parent_death_signal()
