"""The safetensors format, in one file."""

from __future__ import annotations

from pathlib import Path

from sd_mecha.extensions.model_formats import ModelFormat, register_model_format
from sd_mecha.storage.safetensors import SafetensorsReader, SafetensorsWriter

_MAX_HEADER = 100_000_000  # bytes; the limit of the format


@register_model_format
class SafetensorsFormat(ModelFormat):
    """`.safetensors` files, and files of any name that begin like one."""

    identifier = "safetensors"
    suffixes = (".safetensors",)

    def matches(self, path: Path) -> bool:
        if not path.is_file():
            return False
        if path.suffix.lower() == ".safetensors":
            return True  # opening it says what is wrong with it, which is more than "unknown format"
        with path.open("rb") as file:
            head = file.read(9)
        return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER

    def reader(self, path: Path) -> SafetensorsReader:
        return SafetensorsReader(path)

    def writer(self, path: Path) -> SafetensorsWriter:
        return SafetensorsWriter(path)
