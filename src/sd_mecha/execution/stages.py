"""Running the stages of one program.

A tile stage passes over its tensor once, or once more for every answer that a streamed reduction is waiting for. In
each pass only those steps run that lead to an open question; when none is open, all steps run and results are written.
A tensor that fits one tile answers at once and is read once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sd_mecha.errors import ContractError, StateDictKeyError
from sd_mecha.execution.evaluate import Caller, Deferred, Missing, explain_failure, skipped
from sd_mecha.execution.lane import Lane, is_finite, stays_finite
from sd_mecha.execution.pieces import Work, prepare
from sd_mecha.execution.pool import Pool
from sd_mecha.execution.questions import Dry, Questions
from sd_mecha.extensions.tile import Tile
from sd_mecha.planning.program import Call, Load, Output, Program, Stage, Step, Store, Tiles, Whole
from sd_mecha.planning.tiling import PIECES, last_uses, slots_of
from sd_mecha.storage.contract import Reader, TensorEntry

SHARED_FROM = 1 << 22  # elements from which a tensor is worth several workers, and what each takes at a time


class Sink(Protocol):
    """Where results go."""

    def write(self, target: int, name: str, start: int, buffer: memoryview) -> None: ...


@dataclass(frozen=True)
class Engine:
    """What all programs of one merge share."""

    readers: Sequence[Reader]
    caller: Caller
    pool: Pool[Lane]
    sink: Sink
    tile_bytes: int  # bytes that one worker's tile may hold
    largest_tile: int
    check_finite_output: bool
    warn: Callable[[str], None]


Part = tuple[Sequence[Step], Sequence[tuple[int, ...]]]
"""Steps, and what can be freed after each."""

_OPEN = object()  # stands for the result of a call that still waits for an answer


@dataclass
class Run:
    """One program being run."""

    engine: Engine
    program: Program
    values: dict[int, Any] = field(default_factory=dict)  # constants and entire tensors
    questions: dict[int, Questions] = field(default_factory=dict)  # by slot of the streamed call
    lock: threading.Lock = field(default_factory=threading.Lock)
    sound: set[int] = field(default_factory=set)  # loads of which every element was found finite in an earlier pass

    def __call__(self, lane: Lane) -> None:
        template = self.program.template
        self.values.update(template.constants)
        for stage, frees in zip(template.stages, template.frees, strict=True):
            self.engine.pool.check()
            self._stage(stage, lane, frees)
            if frees:
                lane.synchronize()  # memory that another worker made goes back to that worker
            for slot in frees:
                self.values.pop(slot, None)

    def _stage(self, stage: Stage, lane: Lane, frees: Sequence[int]) -> None:
        if isinstance(stage, Tiles):
            self._tiles(stage, lane, frees)
        elif isinstance(stage, Whole):
            self._whole(stage.step, lane)
        else:
            assert isinstance(stage, Store)
            output = stage.output
            value = self.values[output.slot]
            if not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=output.entry.dtype)
            flat = value.reshape(-1)
            for start, stop in self._ranges(flat.numel()):
                self._write(output, flat[start:stop], start, lane)

    # --- entire tensors --------------------------------------------------------------------------------------------

    def _whole(self, step: Load | Call, lane: Lane) -> None:
        if isinstance(step, Load):
            self.values[step.slot] = self._load_whole(step, lane).reshape(step.stored.shape)
            return
        specs = self.program.template.specs
        numel, slot = max((self._numel(s), -s) for s in (*step.inputs, *step.slots))
        tile = Tile(0, numel, numel, self.program.template.shape(-slot))
        in_pieces = self.engine.caller.makes_pieces(step)
        result = self.engine.caller(step, self.values, self.program, None if in_pieces else tile)
        if hasattr(result, "send"):
            result = self._drive_whole(step, result, tile)
        for slot, value in zip(step.slots, self.engine.caller.unpack(step, result, self.program, specs), strict=True):
            self.values[slot] = value

    def _drive_whole(self, step: Call, generator: Any, tile: Tile) -> Any:
        questions = Questions()
        while (result := self._advance(step, generator, questions, 0, tile.numel)) is _OPEN:
            questions.conclude()
            generator = self.engine.caller(step, self.values, self.program, tile)
        return result

    def _load_whole(self, step: Load, lane: Lane) -> Tensor:
        """An entire tensor, flat; read piece by piece, so that what a cast needs stays small."""
        numel = step.stored.numel
        whole: Tensor | None = None
        for start, stop in self._ranges(numel):
            piece = self._load(step, lane, start, stop)
            if stop - start == numel:
                return piece
            if whole is None:
                whole = torch.empty(numel, dtype=piece.dtype, device=piece.device)
            whole[start:stop] = piece
        return torch.empty(0, dtype=step.dtype, device=lane.device) if whole is None else whole

    def _ranges(self, numel: int) -> Iterator[tuple[int, int]]:
        for start in range(0, numel, self.engine.largest_tile):
            self.engine.pool.check()
            yield start, min(start + self.engine.largest_tile, numel)

    def _numel(self, slot: int) -> int:
        spec = self.program.template.specs[slot]
        return spec.numel if isinstance(spec, TensorEntry) else 1

    # --- tiles -----------------------------------------------------------------------------------------------------

    def _tiles(self, stage: Tiles, lane: Lane, frees: Sequence[int]) -> None:
        # the place is taken before workers look through `values` together; memory only when the first tile is there
        self.values.update(dict.fromkeys(stage.keeps))
        if stage.numel == 0:
            for slot in stage.keeps:
                self._kept(slot, lane.device)
            return
        work = prepare(stage, self.program, self.values, self.engine.caller)
        lane.synchronize()
        for slot in set(frees).difference(stage.keeps):  # `work` has what tiles need of them
            self.values.pop(slot, None)
        size = self._tile_size(stage)
        streamed = [s for s in stage.steps if isinstance(s, Call) and s.why == "streamed reduction"]
        if stage.numel <= size:
            self._finish(work, lane, 0, stage.numel)  # answers are there as soon as they are asked for
            return
        while True:
            frontier = self._frontier(streamed, stage)
            if not frontier:
                break
            part = _leading_to(stage, frontier)
            self._probe(work, part, frontier, lane, size)
            if all(self._question(s).complete for s in frontier):
                continue
            self._every_tile(stage, lane, size, partial(self._evaluate, work, part))
            for step in frontier:
                self._question(step).conclude()
            self.sound.update(
                step.slot for step in part[0] if isinstance(step, Load) and step.slot not in stage.deferred
            )
            lane.synchronize()
        self._every_tile(stage, lane, size, partial(self._finish, work))

    def _tile_size(self, stage: Tiles) -> int:
        elements = min(self.engine.tile_bytes // max(stage.element_bytes, 1), self.engine.largest_tile)
        # a result in pieces costs a call for each tile, so one more piece is worth its memory
        in_pieces = any(isinstance(step, Call) and step.why == PIECES for step in stage.steps)
        count = -(-elements // stage.align) if in_pieces else elements // stage.align
        return max(count, 1) * stage.align

    def _every_tile(self, stage: Tiles, lane: Lane, size: int, work: Callable[[Lane, int, int], Any]) -> None:
        span = max(SHARED_FROM // size, 1) * size

        def part(start: int) -> Callable[[Lane], None]:
            def run(lane: Lane) -> None:
                for a in range(start, min(start + span, stage.numel), size):
                    self.engine.pool.check()
                    work(lane, a, min(a + size, stage.numel))
                lane.synchronize()

            return run

        if stage.numel <= span:
            part(0)(lane)
        else:
            self.engine.pool.share(lane, map(part, range(0, stage.numel, span)))

    def _question(self, step: Call) -> Questions:
        return self.questions.setdefault(step.slots[0], Questions())

    def _frontier(self, streamed: Sequence[Call], stage: Tiles) -> list[Call]:
        """Streamed calls with an open question whose inputs have none."""
        unsettled = {s.slots[0] for s in streamed if not self._question(s).complete}
        if not unsettled:
            return []
        depends: set[int] = set()
        frontier = []
        for step in stage.steps:
            if isinstance(step, Call):
                if depends.isdisjoint(step.inputs):
                    if step.slots[0] in unsettled:
                        frontier.append(step)
                        depends.add(step.slots[0])
                else:
                    depends.update(step.slots)
        return frontier

    def _probe(self, work: Work, part: Part, frontier: Sequence[Call], lane: Lane, size: int) -> None:
        """See on the first tile whether a call that has had answers is satisfied with them."""
        values = self._evaluate(work, part, lane, 0, min(size, work.stage.numel), dry=True)
        for step in frontier:
            if values.get(step.slots[0]) is not _OPEN:
                self._question(step).complete = True

    def _finish(self, work: Work, lane: Lane, start: int, stop: int) -> None:
        stage = work.stage
        values = self._evaluate(work, (stage.steps, stage.frees), lane, start, stop)
        for slot in stage.keeps:
            self._kept(slot, values[slot].device).view(-1)[start:stop] = values[slot].reshape(-1)
        for output in stage.writes:
            self._write(output, values[output.slot].reshape(-1), start, lane)

    def _evaluate(self, work: Work, part: Part, lane: Lane, start: int, stop: int, dry: bool = False) -> dict[int, Any]:
        """Run steps on one tile; the result of a call with an open question is `_OPEN`."""
        stage = work.stage
        values = work.values(start, stop)
        for step, frees in zip(*part, strict=True):
            if isinstance(step, Load):
                if step.slot in stage.deferred:
                    values[step.slot] = Deferred(partial(self._read, work, step, lane, start, stop))
                else:
                    values[step.slot] = self._read(work, step, lane, start, stop)
            elif step.slots[0] not in work.unmade:
                tile = Tile(start, stop, stage.numel, self.program.template.shape(step.slots[0]))
                values[step.slots[0]] = self._tiled_call(step, values, tile, work, dry)
            for slot in frees:
                values.pop(slot, None)
        return values

    def _tiled_call(self, step: Call, values: dict[int, Any], tile: Tile, work: Work, dry: bool) -> Any:
        slot, stage = step.slots[0], work.stage
        if slot in work.sums:
            with self.engine.caller.named(step, self.program):
                return work.sums[slot].add(values, tile)
        if slot in work.makers:
            with self.engine.caller.named(step, self.program):
                result = work.makers[slot](tile)
        else:
            result = self.engine.caller(step, values, self.program, tile)
        if hasattr(result, "send"):
            question = self._question(step)
            whole = tile.start == 0 and tile.stop == stage.numel
            if dry:
                question = Dry(question)
            while (outcome := self._advance(step, result, question, tile.start, stage.numel)) is _OPEN and whole:
                question.conclude()
                result = self.engine.caller(step, values, self.program, tile)
            if outcome is _OPEN:
                return _OPEN
            result = outcome
        if not isinstance(result, Tensor) or result.numel() != tile.stop - tile.start:
            shown = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ContractError(
                f"{self.engine.caller.method_name(step)} promises to work on tiles, but made {shown} of a tile of "
                f'{tile.stop - tile.start} elements; declare tiling="whole"'
            )
        return work.shaped(result.reshape(-1)) if slot in work.makers else result

    def _advance(self, step: Call, generator: Any, question: Questions, start: int, numel: int) -> Any:
        """Run a streamed method with the answers so far: its result, or `_OPEN` where it asks for more."""
        answers: Iterator[Any] = iter([None, *question.answers])
        name = self.engine.caller.method_name(step)
        try:
            for answer in answers:
                request = generator.send(answer)
            question.ask(request, start, numel)
        except StopIteration as stop:
            return stop.value
        except StateDictKeyError as error:
            raise skipped(step, self.program, name) from error
        except Exception as error:
            explain_failure(error, f"merge method {name} failed at key {self.program.name(step.key)!r}")
            raise
        finally:
            generator.close()
        return _OPEN

    # --- bytes -----------------------------------------------------------------------------------------------------

    def _load(self, step: Load, lane: Lane, start: int, stop: int) -> Tensor:
        reader = self.engine.readers[step.reader]
        name = self.program.name(step.name)
        tensor = lane.read(reader, step, name, start, stop)
        if step.guard and step.slot not in self.sound and not is_finite(tensor):
            raise Missing(step.origin, (name,), f"{reader.name} holds inf or nan")
        return tensor

    def _write(self, output: Output, flat: Tensor, start: int, lane: Lane) -> None:
        name = self.program.name(output.name)
        dtype = output.entry.dtype
        if self.engine.check_finite_output and not stays_finite(flat, dtype):
            self.engine.warn(name)
        self.engine.sink.write(output.target, name, start * dtype.itemsize, lane.bytes_of(flat, dtype))

    def _kept(self, slot: int, device: torch.device) -> Tensor:
        """The entire tensor that tiles are put together in; it lies where they lie."""
        with self.lock:
            if self.values[slot] is None:
                entry = self.program.template.specs[slot]
                assert isinstance(entry, TensorEntry)
                self.values[slot] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
            whole: Tensor = self.values[slot]
        return whole

    def _read(self, work: Work, step: Load, lane: Lane, start: int, stop: int) -> Tensor:
        return work.shaped(self._load(step, lane, start, stop))


def _leading_to(stage: Tiles, frontier: Sequence[Call]) -> Part:
    """The steps of a stage that some calls are made from, and these calls."""
    targets = {s for step in frontier for s in step.slots}
    needed = set(targets)
    steps: list[Step] = []
    for step in reversed(stage.steps):
        if not needed.isdisjoint(slots_of(step)):
            steps.append(step)
            if isinstance(step, Call):
                needed.update(step.inputs)
    steps.reverse()
    return steps, last_uses(steps, targets)
