"""Batches are made while others are computed: by a thread and a queue, without processes to start and to feed."""

import atexit
import queue
import threading
from typing import Any, Iterable, Iterator

_LOOK_S = 0.2  # how soon the thread notices that nobody takes any more


class Ahead:
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
