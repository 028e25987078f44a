"""Threads that fetch in the background what will probably be asked for next."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable


class ReadAhead:
    """A queue of fetches, worked off by a bounded number of threads that exist only while there is work.

    The threads are daemons: a program that ends does not wait for a server that does not answer. Whatever goes
    wrong in them is dropped, for the one who needs the data will ask himself and be told.

    Args:
        workers: threads at most.
        longest: tasks that may wait; the oldest are dropped first.
    """

    def __init__(self, workers: int, longest: int = 64) -> None:
        self._workers = workers
        self._running = 0
        self._waiting: deque[tuple[object, Hashable, Callable[[], None]]] = deque(maxlen=longest)
        self._lock = threading.RLock()

    def submit(self, owner: object, what: Hashable, task: Callable[[], None]) -> None:
        """Have a task done, unless the same is waiting already."""
        with self._lock:
            if any(waiting[0] is owner and waiting[1] == what for waiting in self._waiting):
                return
            self._waiting.append((owner, what, task))
            if self._running < self._workers:
                self._running += 1
                try:
                    threading.Thread(target=self._work, name="sd-mecha read-ahead", daemon=True).start()
                except RuntimeError:  # no more threads: what was wanted is fetched when it is needed
                    self._running -= 1

    def forget(self, owner: object) -> None:
        """Drop what waits for an owner."""
        with self._lock:
            kept = [waiting for waiting in self._waiting if waiting[0] is not owner]
            self._waiting.clear()
            self._waiting.extend(kept)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                _, _, task = self._waiting.popleft()
            with contextlib.suppress(Exception):
                task()
            del task  # it keeps the file alive
