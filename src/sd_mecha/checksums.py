"""Checksums of what a merge read and wrote, kept in the metadata of its output so that it can be proven later.

The metadata holds JSON under `mecha_checksums`:

    {"algorithm": "sha256", "output": {key: hex}, "inputs": {model: {key: hex}}}

A checksum is that of the bytes of the whole contiguous tensor, little-endian, as the file holds them; of scaled fp8 and
of formats that are decoded when read, as they are read. `inputs` has every tensor that the plan reads from a model, by
the path that the recipe gives, escaped as in its text: JSON has no place for names that are not UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, TypeVar, runtime_checkable

import torch

from sd_mecha.errors import FileFormatError, OptionError
from sd_mecha.execution.pool import Pool
from sd_mecha.planning.plan import Plan
from sd_mecha.planning.program import Load, Template
from sd_mecha.recipes.nodes import ModelRecipeNode
from sd_mecha.recipes.tokens import quote, unescape
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader, TensorEntry, Writer, settle
from sd_mecha.storage.remote.addresses import shown_path
from sd_mecha.storage.strict_json import parse_object

CHECKSUMS_KEY = "mecha_checksums"
ALGORITHM = "sha256"
CHUNK = 1 << 20
_UNKNOWN = "0" * hashlib.new(ALGORITHM).digest_size * 2

_logger = logging.getLogger("sd_mecha")
T = TypeVar("T")
ReadInto = Callable[[str, int, memoryview], None]


@dataclass
class Checksums:
    """Checksums by key, as hexadecimal numbers: of the output, and of each model that it was made from."""

    output: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_text(self) -> str:
        """The value for the metadata."""
        inputs = {quote(model)[1:-1]: checksums for model, checksums in self.inputs.items()}
        found = {"algorithm": ALGORITHM, "output": self.output, "inputs": inputs}
        return json.dumps(found, separators=(",", ":"))

    @staticmethod
    def from_text(text: str, source: str) -> Checksums:
        """Read the value that the metadata of a file holds.

        Raises:
            FileFormatError: it is malformed.
        """
        found = parse_object(text.encode("utf-8", "surrogatepass"), f"{source}: {CHECKSUMS_KEY}")
        algorithm, output, inputs = (found.get(name) for name in ("algorithm", "output", "inputs"))
        if algorithm != ALGORITHM:
            raise FileFormatError(f"{source}: {CHECKSUMS_KEY}: algorithm is {algorithm!r}, expected {ALGORITHM!r}")
        if not _are_texts(output) or not isinstance(inputs, dict) or not all(map(_are_texts, inputs.values())):
            raise FileFormatError(f"{source}: {CHECKSUMS_KEY}: expected keys and their checksums as text")
        return Checksums(output, {unescape(model): checksums for model, checksums in inputs.items()})


def _are_texts(found: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


@runtime_checkable
class Amendable(Writer, Protocol):
    """A writer that lets what it has be read again, and its metadata be replaced, before it is committed.

    One that stores tensors as something else than they were declared also has `as_read`: the declared tensors as
    `read_back`, and later whoever reads the result, finds them; known after `declare`.
    """

    @property
    def dropped(self) -> Collection[str]:
        """The declared tensors that the result lacks."""

    def read_back(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of a finished tensor from byte `start` on."""

    def amend(self, metadata: Mapping[str, str]) -> None:
        """Take other metadata, which is not longer than what was declared."""


class ChecksumWriter:
    """Adds checksums to the metadata of what another writer writes.

    Room for them is taken when the output is declared. The inputs are read once, before the merge begins; the output
    is read once, when it is complete, so that it does not matter in which order and in how many runs it came about.

    Args:
        writer: where everything goes.
        read: model -> its reader and the names of tensors that are read from it.
        workers: how many threads compute checksums; 0 is the calling thread.

    Raises:
        OptionError: the writer has no room for checksums.
    """

    def __init__(self, writer: Writer, read: Mapping[str, tuple[Reader, Iterable[str]]], workers: int) -> None:
        if not isinstance(writer, Amendable):
            raise OptionError("checksums=True: this output has no metadata to keep checksums in; leave it out")
        self._writer = writer
        self._read = read
        self._workers = workers
        self._entries: dict[str, TensorEntry] = {}
        self._metadata: dict[str, str] = {}
        self._inputs: dict[str, dict[str, str]] = {}

    @property
    def completed(self) -> Collection[str]:
        """What an earlier run finished."""
        return getattr(self._writer, "completed", frozenset())

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        self._metadata = dict(metadata)
        room = Checksums(
            dict.fromkeys(entries, _UNKNOWN), {m: dict.fromkeys(k, _UNKNOWN) for m, (_, k) in self._read.items()}
        )
        self._writer.declare(entries, {**metadata, CHECKSUMS_KEY: room.to_text()})
        self._entries = dict(getattr(self._writer, "as_read", entries))
        _logger.info("computing checksums of %d input tensors", sum(len(keys) for keys in room.inputs.values()))
        for model, (reader, keys) in self._read.items():
            sizes = {key: reader.entries[key].nbytes for key in keys}
            self._inputs[model] = digests(reader.read_into, sizes, self._workers)

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        self._writer.write(name, start, buffer)

    def drop(self, name: str) -> None:
        self._writer.drop(name)

    def finished(self, name: str) -> None:
        getattr(self._writer, "finished", lambda name: None)(name)

    def settle(self) -> None:
        settle(self._writer)

    def commit(self) -> None:
        gone = self._writer.dropped
        sizes = {name: entry.nbytes for name, entry in self._entries.items() if name not in gone}
        found = Checksums(digests(self._writer.read_back, sizes, self._workers), self._inputs)
        self._writer.amend({**self._metadata, CHECKSUMS_KEY: found.to_text()})
        self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()


def tensors_read(planned: Plan, target: int) -> dict[str, tuple[Reader, list[str]]]:
    """Models by the paths in the recipe, with the tensors of theirs that one output of a plan is made from."""
    loads: dict[int, dict[str, None]] = {}
    for program in planned.programs:
        for load in _loads(program.template, target):
            loads.setdefault(load.reader, {})[program.name(load.name)] = None
    names: dict[int, str] = {}
    for node, number in planned.models.index.items():  # what a config adds to a model is in no file
        reader = planned.readers[number]
        assert isinstance(node, ModelRecipeNode)
        names.setdefault(number, reader.name if node.path is None else shown_path(node.path))
    found: dict[str, tuple[Reader, list[str]]] = {}
    for number in sorted(names.keys() & loads.keys()):
        name, count = names[number], 1
        while name in found:  # models in memory all have one name
            count += 1
            name = f"{names[number]} ({count})"
        found[name] = planned.readers[number], list(loads[number])
    return found


def _loads(template: Template, target: int) -> list[Load]:
    """The tensors that a template reads for one of several outputs."""
    needed = {output.slot for output in template.outputs if output.target == target}
    found = []
    for step in reversed(template.steps):
        if isinstance(step, Load):
            if step.slot in needed:
                found.append(step)
        elif not needed.isdisjoint(step.slots):
            needed.update(step.inputs)
    return found[::-1]


def digests(read: ReadInto, sizes: Mapping[str, int], workers: int) -> dict[str, str]:
    """The checksums of some tensors, in the order of `sizes`.

    Args:
        read: fills a buffer with the bytes of a tensor from some byte on.
        sizes: name -> bytes.
        workers: how many threads do it; 0 is the calling thread.
    """
    found = dict.fromkeys(sizes, "")

    def digest(buffer: torch.Tensor, name: str) -> None:
        checksum = hashlib.new(ALGORITHM)
        for part in parts(read, name, sizes[name], buffer):
            checksum.update(part)
        found[name] = checksum.hexdigest()

    in_parallel(sizes, digest, workers)
    return found


def parts(read: ReadInto, name: str, nbytes: int, buffer: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor from first to last, as much at once as the buffer holds."""
    view = byte_view(buffer)
    for start in range(0, nbytes, len(view)):
        part = view[: nbytes - start]
        read(name, start, part)
        yield part


def in_parallel(items: Iterable[T], work: Callable[[torch.Tensor, T], None], workers: int) -> None:
    """Call `work` for each item, with a buffer of `CHUNK` bytes that its thread uses again and again.

    Raises:
        Exception: the first of any call; the others end soon.
    """
    pool: Pool[torch.Tensor] = Pool(workers, lambda: torch.empty(CHUNK, dtype=torch.uint8))

    def checked(buffer: torch.Tensor, item: T) -> None:
        pool.check()
        work(buffer, item)

    pool.run(iter(items), checked)
