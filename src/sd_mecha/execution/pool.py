"""Workers. Each takes the next program; one with a large tensor cuts it into ranges that idle workers help with.

The worker that publishes ranges works on them itself until none is left, so that it never waits for help that does not
come. The first exception stops all workers; the calling thread stays responsive to ctrl-C throughout.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch

L = TypeVar("L")
J = TypeVar("J")

POLL_SECONDS = 0.1


class Stopped(BaseException):
    """Raised inside workers once the merge has failed or was interrupted."""


class _Batch(Generic[L]):
    """Ranges of one tensor, taken one by one by whoever is free."""

    def __init__(self, tasks: Iterable[Callable[[L], None]]) -> None:
        self.tasks = deque(tasks)
        self.running = 0
        self.error: BaseException | None = None  # the first exception of a task


class Pool(Generic[L]):
    """Runs jobs on `workers` threads (0: in the calling thread), each with a lane of its own.

    Args:
        make_lane: makes what a worker keeps for itself: buffers, a CUDA stream.
        close_lane: called with it when the calling thread has worked, which goes on to live.
    """

    def __init__(
        self, workers: int, make_lane: Callable[[], L], close_lane: Callable[[L], None] = lambda lane: None
    ) -> None:
        self.workers = workers
        self._make_lane = make_lane
        self._close_lane = close_lane
        self._changed = threading.Condition()
        self._batches: deque[_Batch[L]] = deque()
        self._active = 0
        self._running = 0
        self._ended = 0
        self._error: BaseException | None = None

    def run(self, jobs: Iterator[J], work: Callable[[L, J], None]) -> None:
        """Do every job; re-raises the first exception of any of them."""
        threads_before = torch.get_num_threads()
        try:
            if self.workers == 0:
                torch.set_num_threads(1)
                lane = self._make_lane()
                try:
                    for job in jobs:
                        work(lane, job)
                finally:
                    self._close_lane(lane)
                return
            self._active, self._ended = self.workers, 0
            lock = threading.Lock()
            threads = [
                threading.Thread(target=self._thread, args=(jobs, lock, work), name=f"sd-mecha-{i}", daemon=True)
                for i in range(self.workers)
            ]
            self._start_and_wait(threads)
        finally:
            torch.set_num_threads(threads_before)
        if self._error is not None:
            raise self._error

    def _start_and_wait(self, threads: list[threading.Thread]) -> None:
        # Not by `join`: up to Python 3.12 a ctrl-C in there makes a running thread pass for a finished one.
        try:
            for thread in threads:
                thread.start()
            self._wait_for(lambda: self._ended == len(threads))
        except BaseException as error:  # ctrl-C arrives here: workers stop at their next tile
            self.stop(error)
            self._wait_for(lambda: self._running == 0)
            raise

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            while not condition():
                self._changed.wait(POLL_SECONDS)  # a wait without end could not be interrupted on Windows

    def stop(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def check(self) -> None:
        """Called between tiles.

        Raises:
            Stopped: the merge has failed elsewhere, or was interrupted.
        """
        if self._error is not None:
            raise Stopped

    def share(self, lane: L, tasks: Iterable[Callable[[L], None]]) -> None:
        """Do all tasks, together with workers that have nothing else to do.

        Raises:
            Exception: the first of any task, whoever ran it; by then no task of these is running any more.
        """
        if self.workers < 2:
            for task in tasks:
                task(lane)
            return
        batch: _Batch[L] = _Batch(tasks)
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()
        while self._take_from(batch, lane):
            pass
        with self._changed:
            self._batches.remove(batch)
            self._changed.notify_all()
            self._changed.wait_for(lambda: batch.running == 0)
        if batch.error is not None:
            raise batch.error
        self.check()

    def _take_from(self, batch: _Batch[L], lane: L) -> bool:
        """Do one task; a failure is the business of the worker that shares the batch."""
        with self._changed:
            if not batch.tasks or self._error is not None:
                return False
            task = batch.tasks.popleft()
            batch.running += 1
        try:
            task(lane)
        except BaseException as error:
            with self._changed:
                batch.error = batch.error or error
                batch.tasks.clear()  # the rest of this tensor is in vain
        finally:
            with self._changed:
                batch.running -= 1
                self._changed.notify_all()
        return True

    def _thread(self, jobs: Iterator[J], lock: threading.Lock, work: Callable[[L, J], None]) -> None:
        with self._changed:
            begins = self._error is None  # after ctrl-C nobody waits for a thread that was still starting
            self._running += begins
        if begins:
            self._worker(jobs, lock, work)
        with self._changed:  # only now, when all tensors of the worker are gone, the process may end
            self._running -= begins
            self._ended += 1
            self._changed.notify_all()

    def _worker(self, jobs: Iterator[J], lock: threading.Lock, work: Callable[[L, J], None]) -> None:
        try:
            torch.set_num_threads(1)
            lane = self._make_lane()
            while self._error is None:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    break
                work(lane, job)
            self._help(lane)
        except Stopped:
            pass
        except BaseException as error:
            self.stop(error)

    def _help(self, lane: L) -> None:
        """Nothing is left to start: help with large tensors until every worker has come here."""
        with self._changed:
            self._active -= 1
            self._changed.notify_all()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._batches) or self._active == 0 or self._error is not None)
                if self._error is not None or not self._batches:
                    return
                batch = next((b for b in self._batches if b.tasks), None)
                if batch is None:
                    self._changed.wait(POLL_SECONDS)
                    continue
            self._take_from(batch, lane)
