"""Batches are made while others are computed: by a thread, without processes to start and to feed."""

import atexit
import threading
from collections import deque
from typing import Any, Deque, Iterable, Iterator, Tuple


class Ahead:
    """Goes through an iterable in a thread that is at most `depth` items ahead.

    The thread works when half of its items have been taken, and makes that many in one go: beside steps of a few
    milliseconds, to wake it at each costs more than what it does. It ends when the iterator is closed or forgotten.
    """

    def __init__(self, source: Iterable[Any], depth: int = 2) -> None:
        """Wrap `source`; each iteration starts it anew."""
        self._source, self._depth = source, depth

    def __iter__(self) -> Iterator[Any]:
        ready: Deque[Tuple[bool, Any]] = deque()
        changed = threading.Condition()
        over = threading.Event()

        def hand_over(more: bool, item: Any) -> None:
            with changed:
                ready.append((more, item))
                changed.notify_all()

        def has_room() -> bool:
            """Wait until half of the items are gone; False if nobody takes any more."""
            with changed:
                while len(ready) > self._depth // 2 and not over.is_set():
                    changed.wait()
            return not over.is_set()

        def work() -> None:
            try:
                source = iter(self._source)
                while has_room():
                    while len(ready) < self._depth and not over.is_set():
                        hand_over(True, next(source))
            except StopIteration:
                hand_over(False, None)
            except BaseException as error:  # raised where the item would have been taken
                hand_over(False, error)

        thread = threading.Thread(target=work, name="batches ahead", daemon=True)

        def close() -> None:
            with changed:
                over.set()
                changed.notify_all()
            if thread is not threading.current_thread():
                thread.join()

        thread.start()
        atexit.register(close)  # a thread that is inside torch when the interpreter goes takes the process with it
        try:
            while True:
                with changed:
                    while not ready:
                        changed.wait()
                    more, item = ready.popleft()
                    if len(ready) <= self._depth // 2:
                        changed.notify_all()
                if more:
                    yield item
                elif item is None:
                    return
                else:
                    raise item
        finally:
            close()
            atexit.unregister(close)
