"""Models that are Python mappings of tensors: as a source and as a destination."""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Set
from hashlib import blake2b
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from sd_mecha.errors import OutputError, RecipeTypeError
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import TensorEntry, check_range, flat_bytes

METADATA_KEY = "__metadata__"
_PIECE = 1 << 20  # elements that are looked at together


class MemoryReader:
    """A mapping of tensors of any device and strides, which may share memory; none of them is ever modified.

    Args:
        mapping: name -> tensor, and optionally `__metadata__` -> dict of str to str.
        name: what messages call this model.

    Raises:
        RecipeTypeError: something in the mapping is neither.
    """

    def __init__(self, mapping: Mapping[str, Any], name: str = "in-memory model") -> None:
        self.name = name
        self.metadata: Mapping[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._views: dict[str, memoryview] = {}
        entries = {}
        for key, value in mapping.items():
            if key == METADATA_KEY:
                self.metadata = self._check_metadata(value)
            else:
                self._check_tensor(key, value)
                self._tensors[key] = value
                entries[key] = TensorEntry(tuple(value.shape), value.dtype)
        self.entries: Mapping[str, TensorEntry] = entries

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor itself, not a copy: to be read only."""
        return self._tensors[name]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Copy the bytes that the tensor would have if it were contiguous, from byte `start` on."""
        target = flat_bytes(buffer)
        tensor = self._tensors[name]
        check_range(name, start, len(target), self.entries[name].nbytes)
        if not target:
            return
        view = self._views.get(name)
        if view is None and _is_plain(tensor):
            view = self._views[name] = byte_view(tensor)
        if view is not None:
            target[:] = view[start : start + len(target)]
            return
        first = start // tensor.itemsize
        last = -(-(start + len(target)) // tensor.itemsize)
        skip = start - first * tensor.itemsize
        target[:] = byte_view(_elements(tensor, first, last))[skip : skip + len(target)]

    @property
    def fingerprint(self) -> str:
        """A checksum of the tensors, computed when it is asked for."""
        return content_digest(self._tensors)

    def close(self) -> None:
        """Forget the tensors."""
        self._tensors, self._views = {}, {}

    def _check_metadata(self, value: Any) -> dict[str, str]:
        if isinstance(value, Mapping) and all(isinstance(t, str) for pair in value.items() for t in pair):
            return dict(value)
        raise RecipeTypeError(f"{self.name}: {METADATA_KEY!r} must map str to str, got {type(value).__name__}")

    def _check_tensor(self, key: Any, value: Any) -> None:
        if not isinstance(key, str):
            raise RecipeTypeError(f"{self.name}: keys must be str, got {type(key).__name__} {key!r}")
        if isinstance(value, Mapping):
            hint = f"; if the tensors are inside it, pass mapping[{key!r}] instead"
            raise RecipeTypeError(f"{self.name}: {key!r} must be a tensor, got a {type(value).__name__}{hint}")
        if not isinstance(value, torch.Tensor):
            hint = "; convert it with torch.as_tensor() or remove it"
            raise RecipeTypeError(f"{self.name}: {key!r} must be a tensor, got {type(value).__name__}{hint}")
        if is_lazy(value):
            raise RecipeTypeError(f"{self.name}: {key!r} has no data yet; run the module once before merging it")
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            hint = "; convert it with .to_dense() or .dequantize()"
            raise RecipeTypeError(
                f"{self.name}: {key!r} must be a dense tensor, got {value.layout} {value.dtype}{hint}"
            )
        if value.is_meta:
            raise RecipeTypeError(f"{self.name}: {key!r} is on the meta device and has no data; load the model first")


class MemoryWriter:
    """Collects a result and puts it in a mapping at commit, in declared order. The tensors are always new
    ones.

    Args:
        target: what commit fills; untouched before.
    """

    def __init__(self, target: MutableMapping[str, Any]) -> None:
        self._target = target
        self._entries: dict[str, TensorEntry] = {}
        self._metadata: dict[str, str] = {}
        self._tensors: dict[str, tuple[torch.Tensor, memoryview]] = {}
        self._written: dict[str, list[int]] = {}
        self._dropped: set[str] = set()
        self._lock = threading.Lock()

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        """State what will be written. Memory is taken tensor by tensor, at the first write to each."""
        self._entries, self._metadata = dict(entries), dict(metadata)
        self._written = {name: [] for name in self._entries}

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        """Copy the buffer to byte `start` of that tensor."""
        view = flat_bytes(buffer)
        check_range(name, start, len(view), self._entries[name].nbytes)
        if view and name not in self._dropped:
            self._allocate(name)[1][start : start + len(view)] = view
            self._written[name].append(len(view))

    def drop(self, name: str) -> None:
        """Leave that tensor out of the result, written or not, and free its memory."""
        if name not in self._entries:
            raise KeyError(name)
        self._dropped.add(name)
        self._tensors.pop(name, None)

    @property
    def dropped(self) -> Set[str]:
        """The declared tensors that the result lacks."""
        return self._dropped

    def read_back(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of a finished tensor from byte `start` on."""
        target = flat_bytes(buffer)
        check_range(name, start, len(target), self._entries[name].nbytes)
        if target:
            target[:] = self._allocate(name)[1][start : start + len(target)]

    def amend(self, metadata: Mapping[str, str]) -> None:
        """Put other metadata into the mapping than was declared."""
        self._metadata = dict(metadata)

    def complete(self, name: str) -> torch.Tensor:
        """The finished tensor, before commit, for a consumer that streams.

        Raises:
            OutputError: not all of it was written.
        """
        nbytes, done = self._entries[name].nbytes, sum(self._written[name])
        if done < nbytes:
            raise OutputError(f"in-memory output: {name!r} is incomplete: {done} of {nbytes} bytes were written")
        return self._allocate(name)[0]

    def commit(self) -> None:
        """Put every tensor in the mapping, then the metadata, if any.

        Raises:
            OutputError: a tensor is incomplete; the mapping is untouched.
        """
        finished = {name: self.complete(name) for name in self._entries if name not in self._dropped}
        for name, tensor in finished.items():
            self._target[name] = tensor
        if self._metadata:
            self._target[METADATA_KEY] = dict(self._metadata)
        self.abort()

    def abort(self) -> None:
        """Let go of the tensors. Harmless after commit or a second time."""
        self._entries, self._tensors, self._metadata = {}, {}, {}

    def _allocate(self, name: str) -> tuple[torch.Tensor, memoryview]:
        pair = self._tensors.get(name)
        if pair is not None:
            return pair
        with self._lock:
            if name not in self._tensors:
                entry = self._entries[name]
                try:
                    tensor = torch.empty(entry.shape, dtype=entry.dtype)
                except (RuntimeError, MemoryError) as error:
                    raise OutputError(f"in-memory output: no memory for {name!r} of {entry.nbytes} bytes") from error
                self._tensors[name] = (tensor, byte_view(tensor))
            return self._tensors[name]


def content_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A checksum of names, shapes, dtypes and values."""
    found = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        found.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        for start in range(0, tensor.numel(), _PIECE):
            found.update(byte_view(_elements(tensor, start, min(start + _PIECE, tensor.numel()))))
    return found.hexdigest()


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _elements(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Elements first to last in row-major order as a new contiguous CPU tensor, copying only the rows they
    touch."""
    tensor = tensor.detach()
    while tensor.ndim > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim:
        row = tensor.numel() // tensor.shape[0]
        top = first // row
        tensor = tensor[top : -(-last // row)]
        first, last = first - top * row, last - top * row
    return tensor.cpu().resolve_conj().resolve_neg().reshape(-1)[first:last].contiguous()
