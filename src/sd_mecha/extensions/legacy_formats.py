"""Readers and writers over the mappings that formats of sd-mecha 1 open: whole tensors, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

from sd_mecha.extensions.config_tables import StructuralModelConfig
from sd_mecha.extensions.config_types import KeyMetadata
from sd_mecha.storage.contract import TensorEntry, check_range, flat_bytes


class MappingReader:
    """Reads ranges out of a mapping of key -> tensor, keeping the tensor that was read last."""

    def __init__(self, mapping: Any, name: str) -> None:
        self.name = name
        self._mapping = mapping
        self._lock = threading.Lock()
        self._last: tuple[str, torch.Tensor] | None = None
        items: Mapping[str, Any] = mapping.metadata() if hasattr(mapping, "metadata") else dict(mapping.items())
        self.entries: Mapping[str, TensorEntry] = {
            key: TensorEntry(tuple(about.shape), about.dtype) for key, about in items.items()
        }
        self.metadata: Mapping[str, str] = {}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        target = flat_bytes(buffer)
        check_range(name, start, len(target), self.entries[name].nbytes)
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = (name, self._mapping[name].contiguous().cpu())
            tensor = self._last[1]
        raw = tensor.reshape(-1).view(torch.uint8)[start : start + len(target)]
        if len(target):
            torch.frombuffer(target, dtype=torch.uint8).copy_(raw)

    def close(self) -> None:
        self._last = None
        if hasattr(self._mapping, "close"):
            self._mapping.close()


class MappingWriter:
    """Collects ranges of each tensor and puts it into a mapping when it is complete.

    Args:
        open_mapping: (config of the output, recipe text) -> the mapping to fill.
    """

    def __init__(self, open_mapping: Callable[[Any, str], Any]) -> None:
        self._open = open_mapping
        self._lock = threading.Lock()
        self._entries: dict[str, TensorEntry] = {}
        self._pending: dict[str, tuple[torch.Tensor, int]] = {}
        self._mapping: MutableMapping[str, torch.Tensor] | None = None

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        self._entries = dict(entries)
        config = StructuralModelConfig({k: KeyMetadata(entry.shape, entry.dtype) for k, entry in entries.items()})
        self._mapping = self._open(config, metadata.get("mecha_recipe", ""))

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        source = flat_bytes(buffer)
        entry = self._entries[name]
        check_range(name, start, len(source), entry.nbytes)
        if not entry.nbytes:
            return  # put at commit, since nothing needs to be written for it
        with self._lock:
            if name not in self._pending:
                self._pending[name] = (torch.empty(entry.shape, dtype=entry.dtype), entry.nbytes)
            tensor = self._pending[name][0]
        raw = torch.frombuffer(bytearray(source), dtype=torch.uint8)
        tensor.reshape(-1).view(torch.uint8)[start : start + len(source)].copy_(raw)
        with self._lock:
            missing = self._pending[name][1] - len(source)
            self._pending[name] = (tensor, missing)
            if not missing and self._mapping is not None:
                del self._pending[name]
                self._mapping[name] = tensor

    def drop(self, name: str) -> None:
        with self._lock:
            self._pending.pop(name, None)
            self._entries.pop(name, None)

    def commit(self) -> None:
        for name, entry in self._entries.items():
            if entry.nbytes == 0 and self._mapping is not None:
                self._mapping[name] = torch.empty(entry.shape, dtype=entry.dtype)
        self._close()

    def abort(self) -> None:
        self._pending.clear()
        self._close()

    def _close(self) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is not None and hasattr(mapping, "close"):
            mapping.close()
