"""Running a plan: programs to workers, results to writers.

Policy. Programs start in the order of the plan, which follows the data of the first model, so that files are read
forwards. Tile buffers are small and belong to workers; entire tensors are claimed from the byte budget before a
program starts. A program that meets a missing input (NaN, a skipped key) is planned again without it and started
over; what it had written is overwritten or dropped, so the result does not depend on where it stopped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from sd_mecha.execution.budget import Budget
from sd_mecha.execution.evaluate import Caller, Missing
from sd_mecha.execution.lane import Lane, make_lane, numbered
from sd_mecha.execution.pool import Pool, Stopped
from sd_mecha.execution.stages import Engine, Run
from sd_mecha.planning.plan import Plan
from sd_mecha.planning.program import Program
from sd_mecha.recipes.nodes import RecipeNode
from sd_mecha.storage.contract import Writer

_logger = logging.getLogger("sd_mecha")

CPU_TILE_BYTES = 4 << 20  # what one worker's tile may hold: a few times the second-level cache
CPU_TILE = 1 << 17
CUDA_TILE_BYTES = 256 << 20
CUDA_TILE = 1 << 22
KEPT = 16 << 20  # twice as much may stay free at the end of each heap

Finished = Callable[[int, str, int], None]
"""(target, key, bytes) of a result that is complete."""


@dataclass(frozen=True)
class RunOptions:
    """What running needs to know of the options of merging."""

    workers: int
    budget: int
    device: torch.device | None
    check_finite_output: bool = True
    validate: bool = True
    cpu_tile: int = CPU_TILE


class _Sinks:
    """The writers of the targets, as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers

    def write(self, target: int, name: str, start: int, buffer: memoryview) -> None:
        self._writers[target].write(name, start, buffer)

    def drop(self, target: int, name: str) -> None:
        self._writers[target].drop(name)


def keep_freed_memory() -> None:
    """Let the C library keep what one tile frees for the next one.

    A block of this size that comes and goes tells glibc that such ones will come again: from then on it keeps smaller
    ones, instead of returning them to the system, which clears their pages for every tile. The block is never touched.
    """
    torch.empty(KEPT, dtype=torch.uint8)


class Runner:
    """Runs the programs of a plan; writers have been declared, and are committed or aborted by the caller."""

    def __init__(self, plan: Plan, writers: Sequence[Writer], options: RunOptions, finished: Finished) -> None:
        keep_freed_memory()
        self._plan = plan
        self._sinks = _Sinks(writers)
        self._finished = finished
        device = numbered(options.device)
        self._pool: Pool[Lane] = Pool(options.workers, lambda: make_lane(device), Lane.close)
        self._budget = Budget(options.budget)
        self._replanning = threading.Lock()
        on_gpu = options.device is not None and options.device.type == "cuda"
        share = options.budget // max(options.workers, 1)
        self._engine = Engine(
            plan.readers,
            Caller(plan.callables, options.validate),
            self._pool,
            self._sinks,
            min(CUDA_TILE_BYTES if on_gpu else CPU_TILE_BYTES, share),
            CUDA_TILE if on_gpu else options.cpu_tile,
            options.check_finite_output,
            _WarnOnce(),
        )

    def run(self, programs: Iterable[Program]) -> None:
        """Run some programs to their end.

        Raises:
            Exception: whatever a merge method, a reader or a writer raised first.
        """
        self._pool.run(iter(programs), self._work)

    def stop(self) -> None:
        """Make `run`, in another thread, end soon."""
        self._pool.stop(Stopped())
        self._budget.stop()

    def _work(self, lane: Lane, program: Program) -> None:
        try:
            self._run_program(lane, program)
        except BaseException:
            self._budget.stop()
            raise

    def _run_program(self, lane: Lane, program: Program) -> None:
        missing: set[tuple[RecipeNode, str]] = set()
        dropped: set[tuple[int, str]] = set()
        left: Program | None = program
        while left is not None:
            try:
                with self._budget.claim(left.template.whole_bytes):
                    Run(self._engine, left)(lane)
                break
            except Missing as gone:
                with self._replanning:
                    found = {(self._plan.origin(gone.origin), key) for key in gone.keys}
                    if found <= missing:
                        raise RuntimeError(f"{gone.reason}, although it was planned without") from gone
                    missing |= found
                    left, lost = self._plan.without(program, missing)
                _tell(gone, lost)
                for output in set(lost) - dropped:
                    self._sinks.drop(*output)
                    dropped.add(output)
        for target, key, entry in program.outputs:
            if (target, key) not in dropped:
                self._finished(target, key, entry.nbytes)


def _tell(gone: Missing, lost: Iterable[tuple[int, str]]) -> None:
    """A tensor that cannot be used is worth a warning; a method that skips a key does so on purpose."""
    left_out = ", ".join(sorted({repr(key) for _, key in lost}))
    outcome = f"{left_out} left out of the result" if left_out else "another source takes its place"
    keys = ", ".join(map(repr, gone.keys))
    level = logging.DEBUG if gone.deliberate else logging.WARNING
    _logger.log(level, "%s at key %s, which counts as missing: %s", gone.reason, keys, outcome)


class _WarnOnce:
    """Warns of non-finite results, once for each key."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, key: str) -> None:
        with self._lock:
            first = key not in self._seen
            self._seen.add(key)
        if first:
            _logger.warning("the result at key %r holds inf or nan", key)
