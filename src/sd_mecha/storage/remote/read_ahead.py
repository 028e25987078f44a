"""Threads that fetch in the background what will probably be asked for next."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable

IDLE = 1.0
"""Seconds without work after which a thread ends."""


class ReadAhead:
    """A queue of fetches, worked off by a bounded number of threads, which stay until they are dismissed or idle.

    The threads are daemons: a program that ends does not wait for a server that does not answer. Whatever goes
    wrong in them is dropped, for the one who needs the data will ask himself and be told.

    Args:
        workers: threads at most.
        longest: tasks that may wait; the oldest are dropped first.
    """

    def __init__(self, workers: int, longest: int = 64) -> None:
        self._workers = workers
        self._running = 0
        self._idle = 0
        self._needed = False
        self._waiting: deque[tuple[object, Hashable, Callable[[], None]]] = deque(maxlen=longest)
        self._arrived = threading.Condition(threading.Lock())

    @property
    def busy(self) -> bool:
        """Whether something waits or is being done."""
        return bool(self._waiting) or self._running > self._idle

    def submit(self, owner: object, what: Hashable, task: Callable[[], None]) -> None:
        """Have a task done, unless the same is waiting already.

        Not to be called with a lock that tasks take: it may wait for a thread to start, which takes a while where
        others are busy.
        """
        with self._arrived:
            if any(waiting[0] is owner and waiting[1] == what for waiting in self._waiting):
                return
            self._needed = True
            self._waiting.append((owner, what, task))
            if len(self._waiting) <= self._idle or self._running == self._workers:
                self._arrived.notify()
                return
            self._running += 1
        try:
            threading.Thread(target=self._work, name="sd-mecha read-ahead", daemon=True).start()
        except RuntimeError:  # no more threads: what was wanted is fetched when it is needed
            with self._arrived:
                self._running -= 1

    def forget(self, owner: object) -> None:
        """Drop what waits for an owner."""
        with self._arrived:
            kept = [waiting for waiting in self._waiting if waiting[0] is not owner]
            self._waiting.clear()
            self._waiting.extend(kept)

    def dismiss(self) -> None:
        """Let the threads end once nothing waits; more work starts new ones."""
        with self._arrived:
            self._needed = False
            self._arrived.notify_all()

    def _work(self) -> None:
        while True:
            with self._arrived:
                tired = False
                while not self._waiting:
                    if tired or not self._needed:
                        self._running -= 1
                        return
                    self._idle += 1
                    tired = not self._arrived.wait(IDLE)
                    self._idle -= 1
                task = self._waiting.popleft()[2]
            with contextlib.suppress(Exception):
                task()
            del task  # it keeps the file alive
