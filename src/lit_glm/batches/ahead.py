"""The next batch is made while this one is computed: by a thread, without processes to start and to feed."""

import queue
import threading
from typing import Any, Iterable, Iterator, Tuple

_DEPTH = 2


class Ahead:
    """Goes through an iterable in a thread that is at most two items ahead.

    Collating is array work, which leaves Python's lock to the training loop most of the time. The thread ends when the
    iterator is closed or forgotten.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        """Wrap `source`; each iteration starts it anew."""
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue[Tuple[bool, Any]] = queue.Queue(_DEPTH)
        over = threading.Event()

        def put(entry: Tuple[bool, Any]) -> bool:
            while not over.is_set():
                try:
                    ready.put(entry, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for item in self._source:
                    if not put((True, item)):
                        return
                put((False, None))
            except BaseException as error:  # raised where the item would have been taken
                put((False, error))

        threading.Thread(target=work, name="batches ahead", daemon=True).start()
        try:
            while True:
                more, item = ready.get()
                if more:
                    yield item
                elif item is None:
                    return
                else:
                    raise item
        finally:
            over.set()
