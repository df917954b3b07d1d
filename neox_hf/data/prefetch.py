"""An iterator that runs ahead of its reader in a thread."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.1


class Prefetch(Generic[T]):
    """Items of `source`, up to `depth` of them made before they are asked for.

    What `source` raises is raised to the reader in its turn. Close it before the process forks: a thread does not
    survive a fork, but what it has locked stays locked.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(source,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        """Ends with `source`, or when this is closed."""
        while not self._closed.is_set():
            try:
                item, error = self._items.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    def close(self, unblock: Callable[[], None]) -> None:
        """Ends the thread. `unblock` makes `source` return or raise where it may be waiting for ever."""
        self._closed.set()
        unblock()
        self._thread.join()

    def _run(self, source: Iterator[T]) -> None:
        try:
            for item in source:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - raised again where the item is asked for
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        """Wait for room; False if the reader has gone."""
        while not self._closed.is_set():
            try:
                self._items.put(entry, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
