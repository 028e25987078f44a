"""Reading the folders that `torch.distributed.checkpoint` writes, by range and without running them.

`.metadata` is a pickle: for each tensor its dtype, shape and the chunks in which the processes wrote it, and for each
chunk the file, the place and the length of what `torch.save` made of it. A chunk is a zip archive of one tensor; its
directory is read when the chunk is first needed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import ByteSource, TensorEntry, check_range, flat_bytes
from sd_mecha.storage.dtypes import TO_SAFETENSORS
from sd_mecha.storage.locations import Location
from sd_mecha.storage.pytorch.chunks import Chunk, check_apart, check_cover
from sd_mecha.storage.pytorch.names import TorchNames
from sd_mecha.storage.pytorch.pickle_machine import MAX_PICKLE, PickleMachine
from sd_mecha.storage.pytorch.pickle_opcodes import OBJECT, Inert
from sd_mecha.storage.pytorch.state_dicts import pick_state_dict
from sd_mecha.storage.pytorch.strided import WORDS, boxes
from sd_mecha.storage.strict_json import brief

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint."
_MAX_FILES = 100_000


class _DcpNames(TorchNames):
    """The globals of `.metadata`, which has no storages."""

    _more = (_MODULE, "torch.distributed._shard.", "torch.distributed.tensor.")

    def persistent(self, machine: PickleMachine, identifier: Any) -> Any:
        machine.fail("it refers to a storage, of which it has none")


class _Described:
    """A tensor that `.metadata` describes under a key."""

    __slots__ = ("key", "what")

    def __init__(self, key: str, what: Inert) -> None:
        self.key = key
        self.what = what


class DcpReader:
    """A folder of `torch.distributed.checkpoint`. Opening reads `.metadata` only.

    Args:
        folder: where it lies.

    Raises:
        FileFormatError: the folder is incomplete or broken, or holds no model.
    """

    def __init__(self, folder: Location) -> None:
        self.name = folder.name
        self.metadata: Mapping[str, str] = {}
        self._folder = folder
        self._files: dict[str, ByteSource] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        entries: dict[str, TensorEntry] = {}
        try:
            self._open(folder, entries)
        except BaseException:
            self.close()
            raise
        self.entries: Mapping[str, TensorEntry] = entries

    @property
    def fingerprint(self) -> str:
        """What tells these files from others that stood in their place earlier or later."""
        parts = "\n".join(file.fingerprint for file in self._files.values())
        return f"{self.name} {hashlib.sha256(parts.encode('utf-8', 'surrogateescape')).hexdigest()}"

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of that tensor on, put together from its chunks.

        Raises:
            ChangedInputError: a file was replaced or shortened meanwhile.
            FileFormatError: a chunk is not what `.metadata` says.
        """
        entry, chunks, target = self.entries[name], self._chunks[name], flat_bytes(buffer)
        check_range(name, start, len(target), entry.nbytes)
        if not target:
            return
        if len(chunks) == 1:
            chunks[0].tensor().read_into(chunks[0].file, name, start, target)
            return
        item = entry.dtype.itemsize
        first, last = start // item, -(-(start + len(target)) // item)
        values, done = torch.empty(last - first, dtype=WORDS[item]), 0
        for starts, sizes in boxes(entry.shape, first, last):
            count = math.prod(sizes)
            out = values[done : done + count].view(sizes)
            done += count
            for chunk in chunks:
                chunk.read_common(starts, out)
        target[:] = byte_view(values)[start - first * item :][: len(target)]

    def check_unchanged(self) -> None:
        """Raise ChangedInputError if one of the files is not the one that was opened any more."""
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _open(self, folder: Location, entries: dict[str, TensorEntry]) -> None:
        file = self._files[METADATA] = folder.child(METADATA).open()
        if file.size > MAX_PICKLE:
            self._fail(f"{METADATA} has {file.size} bytes; expected at most {MAX_PICKLE}")
        machine = PickleMachine(file.read(0, file.size), _DcpNames(), file.name)
        loaded = machine.run()
        fields = self._fields(loaded, "metadata.Metadata")
        tensors, paths = fields.get("state_dict_metadata"), fields.get("planner_data")
        storages = fields.get("storage_data")
        if type(tensors) is not dict or type(storages) is not dict:
            self._fail(f"{METADATA} lists no tensors, or not where they are stored")
        nested = self._nested(tensors, paths, machine)
        picked = pick_state_dict(nested, lambda value: type(value) is _Described, self.name)
        stored = self._stored(storages, machine)
        compared = 0
        for name, described in picked.items():
            fields = self._fields(described.what, "metadata.TensorStorageMetadata")
            entry, chunks = self._tensor(described.key, fields, stored, machine)
            compared += check_cover(self.name, name, entry.shape, chunks, compared)
            entries[name] = entry
            self._chunks[name] = chunks
        check_apart(self.name, itertools.chain.from_iterable(self._chunks.values()))

    def _nested(self, tensors: dict[Any, Any], paths: Any, machine: PickleMachine) -> dict[Any, Any]:
        """The dict of dicts that was saved, as far as it holds tensors; without paths, a flat one."""
        top: dict[Any, Any] = {}
        for key, what in tensors.items():
            if type(key) is not str or type(what) is not Inert or not what.name.endswith("TensorStorageMetadata"):
                continue
            path = paths.get(key) if type(paths) is dict else None
            if type(path) is not tuple or not 0 < len(path) <= 32 or not all(type(part) is str for part in path):
                path = (key,)
            inner = top
            for part in path[:-1]:
                if part not in inner:
                    machine.put(inner, part, {})
                inner = inner[part]
                if type(inner) is not dict:
                    self._fail(f"tensor {brief(key)} lies within tensor {brief(inner.key)}; expected one of them")
            if path[-1] in inner:
                self._fail(f"tensor {brief(key)} lies where there is another, or a dict of tensors; expected one")
            machine.put(inner, path[-1], _Described(key, what))
        return top

    def _tensor(
        self, key: str, fields: dict[Any, Any], stored: dict[tuple[str, str], dict[Any, Any]], machine: PickleMachine
    ) -> tuple[TensorEntry, list[Chunk]]:
        properties, shape, chunks = fields.get("properties"), fields.get("size"), fields.get("chunks")
        state = properties.state if type(properties) is Inert else None
        dtype = state.get("dtype") if type(state) is dict else state[0] if type(state) is tuple and state else None
        if type(dtype) is not torch.dtype or dtype not in TO_SAFETENSORS:
            self._fail(f"tensor {brief(key)} has the dtype {brief(dtype)}, which cannot be merged")
        entry = TensorEntry(self._numbers(key, shape), dtype)
        if math.prod(size or 1 for size in entry.shape) * dtype.itemsize >= 2**63:
            self._fail(f"tensor {brief(key)} has the shape {brief(shape)}, which is too large")
        found = []
        for chunk in chunks if type(chunks) is list else ():
            machine.charge(OBJECT)  # tensors may share a list
            place = self._fields(chunk, "metadata.ChunkStorageMetadata")
            offsets, sizes = self._numbers(key, place.get("offsets")), self._numbers(key, place.get("sizes"))
            if 0 in sizes and len(sizes) == len(entry.shape):
                continue
            info = stored.pop((key, str(offsets)), None) or stored.pop((key, str(None)), None)
            if info is None:
                self._fail(f"tensor {brief(key)}: the chunk at {offsets} is listed but not stored, or listed twice")
            found.append(self._chunk(key, TensorEntry(sizes, dtype), offsets, info))
        return entry, found

    def _chunk(self, key: str, entry: TensorEntry, offsets: tuple[int, ...], info: dict[Any, Any]) -> Chunk:
        path, begin, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if info.get("transform_descriptors"):
            self._fail(f"tensor {brief(key)} is stored transformed (compressed, for instance); save it without that")
        if type(path) is not str or type(begin) is not int or type(length) is not int:
            self._fail(f"tensor {brief(key)}: no file, place and length of a chunk are given")
        file = self._file(path)
        if begin < 0 or length < 0 or begin + length > file.size:
            self._fail(
                f"tensor {brief(key)}: {length} bytes at byte {begin} are not within the {file.size} bytes of "
                f"{brief(path)}"
            )
        if entry.nbytes > length:
            self._fail(f"tensor {brief(key)}: a chunk of {entry.nbytes} bytes cannot lie in {length} bytes of a file")
        return Chunk(key, file, begin, length, entry, offsets)

    def _file(self, path: str) -> ByteSource:
        if path not in self._files:
            if len(self._files) >= _MAX_FILES:
                self._fail(f"{METADATA} names more than {_MAX_FILES} files")
            self._files[path] = self._folder.child(path).open()
        return self._files[path]

    def _stored(self, storages: dict[Any, Any], machine: PickleMachine) -> dict[tuple[str, str], dict[Any, Any]]:
        """Name of a tensor and place of a chunk in it -> where it is stored.

        Places are kept as text, because tuples of numbers can be chosen so that all their hashes are the same.
        """
        found = {}
        for index, info in storages.items():
            fields = self._fields(index, "metadata.MetadataIndex")
            name, offset = fields.get("fqn"), fields.get("offset")
            if type(name) is str:
                at = str(None if offset is None else self._numbers(name, offset))
                machine.charge(len(at))
                found[name, at] = self._fields(info, "filesystem._StorageInfo")
        return found

    def _fields(self, found: Any, kind: str) -> dict[Any, Any]:
        if type(found) is not Inert or found.name != _MODULE + kind or type(found.state) is not dict:
            self._fail(f"{METADATA} holds {brief(found)} where a {_MODULE}{kind} should be")
        return found.state

    def _numbers(self, key: str, numbers: Any) -> tuple[int, ...]:
        if (
            type(numbers) is not tuple
            or len(numbers) > 64
            or any(type(n) is not int or not 0 <= n < 2**60 for n in numbers)
        ):
            self._fail(f"tensor {brief(key)}: {brief(numbers)} is no shape or place in it")
        return numbers

    def _fail(self, problem: str) -> NoReturn:
        raise FileFormatError(f"{self.name}: cannot read this distributed checkpoint: {problem}")
