"""A byte budget that workers share: what a program is planned to hold is admitted before it starts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Admits claims while their sum stays within `limit`; a claim larger than that runs alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._stopped = False
        self._changed = threading.Condition()

    @contextmanager
    def claim(self, nbytes: int) -> Iterator[None]:
        """Hold `nbytes` of the budget; waits until they are free."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self.used == 0 or self.used + nbytes <= self.limit)
            self.used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self.used -= nbytes
                self._changed.notify_all()

    def stop(self) -> None:
        """Let everyone through: the merge has failed, and nobody may wait for a claim that is never released."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
