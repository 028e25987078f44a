"""Writing a model as a folder: tensors in one or more safetensors files of bounded size, an index, and side files."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sd_mecha.errors import OutputError
from sd_mecha.storage.contract import ByteSource, TensorEntry
from sd_mecha.storage.disk import NO_ROOM, refusal
from sd_mecha.storage.files import descriptor_limit
from sd_mecha.storage.folders.output_folder import OutputFolder
from sd_mecha.storage.folders.sharded import is_known_weights
from sd_mecha.storage.safetensors import SafetensorsWriter
from sd_mecha.units import such_as

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one file, where the user says nothing."""
_logger = logging.getLogger("sd_mecha")
_MAX_TEXT = 2_000_000  # characters of metadata in an index, whose readers bound its size


@dataclass(frozen=True)
class Part:
    """Where in the folder some of the tensors go.

    Attributes:
        stem: what their files are called before the ending.
        folder: the sub-folder, empty for the folder itself.
        prefix: what the names of the tensors begin with, and what the files leave out.
    """

    stem: str
    folder: str = ""
    prefix: str = ""

    def path(self, name: str) -> str:
        """The relative path of a file of that name."""
        return f"{self.folder}/{name}" if self.folder else name

    def replaces(self, path: str) -> bool:
        """Whether a file of that relative path is, or belongs to, another version of the same weights.

        Under whatever name a library looks for weights: it must not find the old ones beside the new.
        """
        folder, _, name = path.rpartition("/")
        numbered = rf"{re.escape(self.stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
        return folder == self.folder and (is_known_weights(name) or re.fullmatch(numbered, name) is not None)


SideFile = tuple[str, bytes | Callable[[], ByteSource]]
"""The relative path of a file, and what is in it or what opens it."""

SideFiles = Callable[[Mapping[str, TensorEntry]], Iterable[SideFile]]
"""Says what goes into the folder beside the tensors that are declared."""


class _Shard:
    """One file of the output, and what it holds by the names in it."""

    def __init__(self, part: Part, entries: Mapping[str, TensorEntry]) -> None:
        self.part = part
        self.entries = entries
        self.name = ""
        self.writer: SafetensorsWriter | None = None

    @property
    def path(self) -> str:
        return self.part.path(self.name)

    @property
    def open(self) -> SafetensorsWriter:
        assert self.writer is not None
        return self.writer


class ShardedWriter:
    """Writes a folder of safetensors files; it appears under its name, whole, at commit.

    Tensors fill files in the order in which they are declared. A tensor larger than a file may be has one of its own.

    Args:
        path: the folder.
        parts: where the tensors go; each to the one whose prefix it has.
        shard_size: the most bytes of tensors in a file.
        side_files: what goes along.
        resume: what the output is made of: go on where a writer with the same text stopped.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parts: Sequence[Part] = (Part("model"),),
        shard_size: int | None = None,
        side_files: SideFiles = lambda entries: (),
        resume: str | None = None,
    ) -> None:
        self._folder = OutputFolder(path)
        self.name = self._folder.path
        self._parts = list(parts)
        self._shard_size = SHARD_SIZE if shard_size is None else shard_size
        self._side_files = side_files
        self._resume = resume
        self._shards: list[_Shard] = []
        self._places: dict[str, tuple[_Shard, str]] = {}
        self._metadata: dict[str, str] = {}

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        """Distribute the tensors over files, reserve the space of all of them, and put the side files down.

        Raises:
            OutputError: the folder cannot be made, or a tensor belongs to no part; nothing is left behind.
        """
        if self._shards:
            raise ValueError(f"{self.name}: declared twice")
        self._metadata = dict(metadata)
        self._distribute(entries)
        self._folder.create([shard.path for shard in self._shards] if self._resume is not None else ())
        try:
            for number, shard in enumerate(self._shards):
                resume = None if self._resume is None else f"{self._resume} {number} {shard.path}"
                path, journal = self._folder.place(shard.path), self._folder.journal(shard.path)
                shard.writer = SafetensorsWriter(path, resume=resume, journal=journal)
                self._reserve(shard, self._metadata_of(number))
                self._folder.protect(shard.path)
            for name, content in self._side_files(entries):
                self._put(name, content)
        except BaseException:
            self.abort()
            raise

    @property
    def completed(self) -> frozenset[str]:
        """What an earlier run has finished."""
        return frozenset(name for name, (shard, there) in self._places.items() if there in shard.open.completed)

    @property
    def dropped(self) -> frozenset[str]:
        """The tensors that the files will lack."""
        return frozenset(name for name, (shard, there) in self._places.items() if there in shard.open.dropped)

    def finished(self, name: str) -> None:
        """All bytes of that tensor are written."""
        shard, there = self._places[name]
        shard.open.finished(there)

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        """Store the buffer at byte `start` of that tensor."""
        shard, there = self._places[name]
        shard.open.write(there, start, buffer)

    def read_back(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with bytes that were written."""
        shard, there = self._places[name]
        shard.open.read_back(there, start, buffer)

    def drop(self, name: str) -> None:
        """Leave that tensor out."""
        shard, there = self._places[name]
        shard.open.drop(there)

    def amend(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata; there is as much room as that of `declare` took."""
        self._metadata = dict(metadata)
        for number, shard in enumerate(self._shards):
            shard.open.amend(self._metadata_of(number))

    def settle(self) -> None:
        """Make all that is complete durable and note it, for a run that goes on from there.

        Raises:
            OutputError: the disk refused.
        """
        for shard in self._shards:
            shard.open.settle()

    def commit(self) -> None:
        """Complete every file, write the indexes and let the folder appear under its name.

        Raises:
            OutputError: a tensor is incomplete, nothing is left of a part, or the disk refused; the folder that was
                there is as it was.
        """
        dropped = sorted(self.dropped)
        try:
            self._check_parts()
            self.settle()
            for shard in self._shards:
                shard.open.commit()
            for part in self._parts:
                self._write_index(part, [shard for shard in self._shards if shard.part == part])
            self._folder.publish(lambda path: any(part.replaces(path) for part in self._parts))
        except BaseException:
            self.abort()
            raise
        if dropped:
            _logger.warning(
                "output %r lacks %d tensors that were left out while merging, %s; libraries fill them with random "
                "numbers when they load it", self.name, len(dropped), such_as(dropped),
            )  # fmt: skip

    def abort(self) -> None:
        """Remove what was written, but for what a run that resumes will go on with. Harmless after commit."""
        for shard in self._shards:
            if shard.writer is not None:
                shard.writer.abort()
        if self._folder.part and any(os.path.exists(self._folder.journal(shard.path)) for shard in self._shards):
            self._folder.release()
            _logger.warning(
                "output %r: what is complete is kept; run again with resume=True (--resume) to go on", self.name
            )
        else:
            self._folder.discard()

    def _distribute(self, entries: Mapping[str, TensorEntry]) -> None:
        by_part: dict[Part, dict[str, TensorEntry]] = {part: {} for part in self._parts}
        for name, entry in entries.items():
            part = next((part for part in self._parts if name.startswith(part.prefix)), None)
            if part is None:
                known = ", ".join(part.prefix for part in self._parts)
                raise OutputError(
                    f"output {self.name!r}: tensor {name!r} belongs to no part of the model that the folder is made "
                    f"after; it has {known}"
                )
            by_part[part][name.removeprefix(part.prefix)] = entry
        for part, inside in by_part.items():
            if not inside and len(self._parts) > 1:
                continue  # that component is not made, but comes with the side files
            groups = _split(inside, self._shard_size)
            for number, group in enumerate(groups):
                shard = _Shard(part, group)
                many = f"-{number + 1:05}-of-{len(groups):05}" if len(groups) > 1 else ""
                shard.name = f"{part.stem}{many}.safetensors"
                self._shards.append(shard)
                self._places |= {part.prefix + there: (shard, there) for there in group}
        if len(self._shards) > descriptor_limit():
            raise OutputError(
                f"output {self.name!r}: files of {self._shard_size} bytes would be {len(self._shards)}, and at most "
                f"{descriptor_limit()} can be written at once; choose a larger shard_size"
            )

    def _reserve(self, shard: _Shard, metadata: Mapping[str, str]) -> None:
        try:
            shard.open.declare(shard.entries, metadata)
        except OutputError as error:
            reason = error.__cause__
            if not isinstance(reason, OSError) or reason.errno not in NO_ROOM:
                raise
            size = sum(entry.nbytes for shard in self._shards for entry in shard.entries.values())
            raise refusal(self.name, f"has no room for {size} bytes", reason) from reason

    def _check_parts(self) -> None:
        """Refuse to replace the weights of a part by none at all."""
        gone = self.dropped
        for part in self._parts:
            names = [name for name, (shard, _) in self._places.items() if shard.part == part]
            if names and gone.issuperset(names):
                lost, omit = "the model", ""
                if part.folder:
                    lost = f"component {part.folder!r}"
                    omit = ", or let omit_component or pick_component leave that component out of the recipe"
                raise OutputError(
                    f"output {self.name!r}: every tensor of {lost} was left out while merging, {such_as(names)}, and "
                    f"nothing was written; give another input that has what is missing{omit}"
                )

    def _metadata_of(self, number: int) -> dict[str, str]:
        """The first file says all; the others, that their tensors are PyTorch's."""
        return {key: text for key, text in self._metadata.items() if number == 0 or key == "format"}

    def _write_index(self, part: Part, shards: Sequence[_Shard]) -> None:
        if len(shards) < 2:
            return
        kept = {name: shard for shard in shards for name in shard.entries if name not in shard.open.dropped}
        total = sum(shard.entries[name].nbytes for name, shard in kept.items())
        texts = self._metadata if sum(map(len, self._metadata.values())) < _MAX_TEXT else {}  # the first file has them
        metadata = {**texts, "total_size": total}
        index = {"metadata": metadata, "weight_map": {name: shard.name for name, shard in kept.items()}}
        raw = json.dumps(index, indent=2, ensure_ascii=False).encode()
        self._folder.put(part.path(f"{part.stem}.safetensors.index.json"), raw)

    def _put(self, name: str, content: bytes | Callable[[], ByteSource]) -> None:
        if isinstance(content, bytes):
            self._folder.put(name, content)
            return
        source = content()
        try:
            self._folder.put(name, source)
        finally:
            source.close()


def _split(entries: Mapping[str, TensorEntry], size: int) -> list[dict[str, TensorEntry]]:
    """Entries in groups of at most `size` bytes, in order; one that is larger makes a group alone."""
    groups: list[dict[str, TensorEntry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if groups[-1] and filled + entry.nbytes > size:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += entry.nbytes
    return groups
