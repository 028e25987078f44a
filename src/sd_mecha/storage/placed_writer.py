"""Writing known tensors to known places of one file, in any order; and going on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import NamedTuple, NoReturn

from sd_mecha.errors import OutputError
from sd_mecha.storage.contract import TensorEntry, check_range, flat_bytes
from sd_mecha.storage.journal import Journal, Line, sample
from sd_mecha.storage.output_file import OutputFile

_GROUP_SIZE = 64 << 20  # bytes of tensors that are moved before the journal is told
_logger = logging.getLogger("sd_mecha")


class Layout(NamedTuple):
    """How a file is laid out: a header, then tensors one after the other, perhaps with bytes between them."""

    header: bytes
    places: Mapping[str, tuple[int, int]]
    """Name -> where it starts and how many bytes it has, in ascending order."""
    size: int
    """Bytes of the whole file."""

    @property
    def room(self) -> int:
        """Bytes before the first tensor."""
        return next((offset for offset, _ in self.places.values()), self.size)


class PlacedWriter(ABC):
    """Writes a file of known tensors in any order, in place, from any number of threads.

    The layout follows from the declaration alone. Hence the bytes of the file do not depend on the order of writing.
    The file appears under its name at commit; see `output_file`. Threads must be done writing before `commit` or
    `abort`. A format derives from this class and says how such a file is laid out.

    Args:
        path: where the file goes.
        resume: what it is made of, as a fingerprint: what is complete is kept when the work is interrupted, and a
            writer of the same path, fingerprint and layout goes on from there. None: nothing is kept.
        journal: of a file in a folder under construction, where its journal goes; see `OutputFile`.

    Attributes:
        completed: names that need not be written because an earlier run did, or found that the file lacks them;
            known after `declare`.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: str | None = None, journal: str | None = None) -> None:
        self._output = OutputFile(path, journal)
        self.name = self._output.path
        self.completed: frozenset[str] = frozenset()
        self._resume = resume
        self._journal: Journal | None = None
        self._entries: Mapping[str, TensorEntry] = {}
        self._metadata: dict[str, str] = {}
        self._layout: Layout | None = None
        self._dropped: set[str] = set()
        # Lengths of the writes of each tensor; appending to a list needs no lock.
        self._written: dict[str, list[int]] = {}
        self._pending: list[str] = []  # complete, or dropped, but not in the journal yet

    @property
    def dropped(self) -> Set[str]:
        """The declared tensors that the file will lack."""
        return self._dropped

    @abstractmethod
    def _lay_out(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], room: int | None) -> Layout:
        """Lay out a file of those tensors.

        Args:
            entries: the tensors.
            metadata: what goes into the header.
            room: None to choose how many bytes to keep before the first tensor; otherwise what was chosen then, with
                other metadata, or for more tensors. The header must fit; tensors keep their order and may only move
                down.

        Raises:
            OutputError: the format cannot hold this, or the header does not fit; see `_refuse`.
        """

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        """Lay the file out, create it under a temporary name and reserve its space.

        Raises:
            OutputError: the format cannot hold this, or the file cannot be created; nothing is left behind.
        """
        if self._layout is not None:
            raise ValueError(f"{self.name}: declared twice")
        layout = self._lay_out(entries, metadata, None)
        self._create(layout, entries)
        self._entries, self._metadata, self._layout = dict(entries), dict(metadata), layout
        self._written = {name: [] for name in layout.places}
        self._recall()

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        """Store the buffer at byte `start` of that tensor, unless it is dropped or was completed by an earlier run.

        What makes a tensor that is missing may make others again, and first in a way that turns out to be wrong. By
        now another tensor may have moved to the place of one that is dropped.

        Raises:
            OutputError: the disk refused.
        """
        view = flat_bytes(buffer)
        offset, nbytes = self._place(name)
        check_range(name, start, len(view), nbytes)
        if view and name not in self._dropped and name not in self.completed:
            self._output.write_at(offset + start, view)
            self._written[name].append(len(view))

    def read_back(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of a tensor that was written and not dropped, before commit."""
        if name in self._dropped:
            raise KeyError(name)
        view = flat_bytes(buffer)
        offset, nbytes = self._place(name)
        check_range(name, start, len(view), nbytes)
        self._output.read_at(offset + start, view)

    def drop(self, name: str) -> None:
        """Leave that tensor out of the file, written or not."""
        self._place(name)
        if name not in self._dropped:
            self._dropped.add(name)
            self._note(name)

    def finished(self, name: str) -> None:
        """State that all of a tensor is written, so that a later run can build on it."""
        self._place(name)
        if name not in self._dropped:
            self._note(name)

    def amend(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata that was declared, before commit.

        Raises:
            OutputError: it needs more room than was reserved for the declared one.
        """
        self._lay_out(self._kept(), metadata, self._declared().room)
        self._metadata = dict(metadata)

    def settle(self) -> None:
        """Make all that is complete durable and note it, for a run that goes on from there.

        Raises:
            OutputError: the disk refused.
        """
        if self._journal is not None:
            self._output.sync()

    def commit(self) -> None:
        """Close the gaps of dropped tensors, write the header, and let the file appear under its name.

        Raises:
            OutputError: a tensor is incomplete or the disk refused; what the name led to before is still
                there, and the temporary file is gone (or kept, as `abort` says).
        """
        try:
            declared = self._declared()
            self._check_complete()
            layout = self._lay_out(self._kept(), self._metadata, declared.room)
            self.settle()
            self._output.on_flush = None  # from now on tensors move
            self._move_down(declared, layout)
            self._fill_holes(layout)
            self._output.write_at(0, memoryview(layout.header))
            if self._journal is not None:
                self._journal.close()  # publishing removes it, which not every system allows while it is open
            self._output.publish(layout.size)
        except BaseException:
            self.abort()
            raise
        self._journal = None

    def abort(self) -> None:
        """Remove the temporary file; a writer that may be resumed keeps what is complete instead. Harmless after
        commit or a second time."""
        journal = self._journal
        if journal is None:
            self._output.discard()
            return
        if not os.path.lexists(self._output.temporary):  # it has its final name already, or somebody removed it
            self._output.discard()
            self._journal = None
            journal.close()
            return
        try:
            self._output.sync()
        except OutputError as error:
            _logger.info("%s", error)  # what the journal already holds is safe all the same
        self._journal = None
        journal.close()
        if not journal.done:
            self._output.discard()
        else:
            self._output.release()
            _logger.warning(
                "output %r: %d of %d tensors are kept; run again with resume=True (--resume) to go on",
                self.name, len(journal.done), len(self._written),
            )  # fmt: skip

    def _create(self, layout: Layout, entries: Mapping[str, TensorEntry]) -> None:
        if self._resume is None:
            self._output.create(layout.size)
            return
        self._output.locate()
        digest = _digest(layout, entries)
        journal = Journal(self._output.journal, self.name, self._resume, digest)
        kept = self._output.create(layout.size, journal.fits)
        self._journal = journal
        try:
            journal.begin(kept)
        except OSError as error:
            self.abort()
            raise OutputError(f"output {self.name!r}: its journal cannot be written: {error.strerror}") from error
        self._output.sync_folder()
        self._output.on_flush = self._mark

    def _recall(self) -> None:
        """Take over what an earlier run completed, unless a sample of it shows that the file holds something else."""
        if self._journal is None:
            return
        moved, layout = self._journal.moved, self._declared()
        places = {name: (moved.get(name, offset), nbytes) for name, (offset, nbytes) in layout.places.items()}
        self._layout = layout._replace(places=places)
        if not self._journal.done:
            return
        known = {name: mark for name, mark in self._journal.done.items() if name in self._written}
        spoilt = [name for name, mark in known.items() if mark is not None and self._sample(name) != mark]
        self._revoke(spoilt)
        for name in spoilt:
            _logger.info("output %r: %r is made again: it is not what the journal says", self.name, name)
        self.completed = frozenset(known.keys() - set(spoilt))
        for name in self.completed:
            if known[name] is None:
                self._dropped.add(name)
            else:
                self._written[name].append(self._place(name)[1])
        done, total = len(self.completed), len(self._written)
        _logger.info("output %r: going on: %d of %d tensors are complete", self.name, done, total)

    def _note(self, name: str) -> None:
        if self._journal is not None:
            self._pending.append(name)
            self._output.flush_if_due()

    def _mark(self) -> Callable[[], None]:
        """Called before a flush: what to add to the journal after it."""
        names = self._pending[:]

        def after() -> None:
            if self._journal is not None and names:
                lines: list[Line] = [(n, None if n in self._dropped else self._sample(n)) for n in names]
                self._journal.append(lines)
            del self._pending[: len(names)]  # not before: the flush may be interrupted

        return after

    def _sample(self, name: str) -> int:
        offset, nbytes = self._place(name)
        return sample(lambda start, view: self._output.read_at(offset + start, view), nbytes)

    def _revoke(self, names: Iterable[str]) -> None:
        if self._journal is None:
            return
        try:
            self._journal.revoke(names)
        except OSError as error:
            raise OutputError(f"output {self.name!r}: its journal cannot be written: {error.strerror}") from error

    def _declared(self) -> Layout:
        if self._layout is None:
            raise ValueError(f"{self.name}: commit without declare")
        return self._layout

    def _kept(self) -> dict[str, TensorEntry]:
        return {name: entry for name, entry in self._entries.items() if name not in self._dropped}

    def _place(self, name: str) -> tuple[int, int]:
        if self._layout is None:
            raise KeyError(name)
        return self._layout.places[name]

    def _check_complete(self) -> None:
        for name, lengths in self._written.items():
            nbytes, done = self._place(name)[1], sum(lengths)
            if done < nbytes and name not in self._dropped:
                got = f"{done} of {nbytes} bytes were written"
                raise OutputError(f"output {self.name!r}: tensor {name!r} is incomplete: {got}")

    def _move_down(self, before: Layout, after: Layout) -> None:
        """Move tensors to where they lie in a file without those that were dropped.

        At any time those of the first groups lie at their new places, those of the others at their old ones, and none
        on another; of one group an interruption may leave nothing, so the journal lacks it meanwhile.
        """
        for names in _groups(before, after):
            lines: list[Line] = []
            if self._journal is not None:
                lines = [(name, self._sample(name), after.places[name][0]) for name in names]
                self._revoke(names)
            for name in names:
                (source, nbytes), (destination, _) = before.places[name], after.places[name]
                self._output.move_down(source, destination, nbytes)
            if self._journal is not None:
                self._output.sync()
                self._journal.append(lines)

    def _fill_holes(self, layout: Layout) -> None:
        """Bytes that no tensor covers are zero, also where something was moved away or an earlier run has written."""
        end = len(layout.header)
        for offset, nbytes in (*layout.places.values(), (layout.size, 0)):
            if offset > end:
                self._output.write_at(end, memoryview(bytes(offset - end)))
            end = offset + nbytes

    def _refuse(self, reason: object) -> NoReturn:
        raise OutputError(f"output {self.name!r}: {reason}")


def _groups(before: Layout, after: Layout) -> Iterator[list[str]]:
    """The names of the tensors that have to move, in order."""
    names: list[str] = []
    size = 0
    for name, (offset, nbytes) in after.places.items():
        if offset == before.places[name][0]:
            continue
        if names and size + nbytes > _GROUP_SIZE:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    if names:
        yield names


def _digest(layout: Layout, entries: Mapping[str, TensorEntry]) -> str:
    """What tells where every tensor lies, and what it is."""
    rows = [[name, *place, str(entries[name].dtype), entries[name].shape] for name, place in layout.places.items()]
    return hashlib.sha256(json.dumps([layout.size, rows]).encode()).hexdigest()
