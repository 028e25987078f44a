"""The safetensors format, in one file."""

from __future__ import annotations

from pathlib import Path

from sd_mecha.extensions.model_formats import LocationFormat, OutputRequest, register_model_format
from sd_mecha.storage.locations import Location
from sd_mecha.storage.safetensors import SafetensorsReader, SafetensorsWriter

_MAX_HEADER = 100_000_000  # bytes; the limit of the format


@register_model_format
class SafetensorsFormat(LocationFormat):
    """Files that begin like a safetensors file, and those of that ending that are nothing else."""

    identifier = "safetensors"
    suffixes = (".safetensors",)

    def recognises(self, location: Location) -> bool:
        head = location.head
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
            return True
        # Opening it says what is wrong with it, which is more than "unknown format".
        return location.basename.lower().endswith(self.suffixes) and location.is_file()

    def open(self, location: Location) -> SafetensorsReader:
        return SafetensorsReader(location.open())

    def writer_for(self, path: Path, request: OutputRequest) -> SafetensorsWriter:
        request.refuse(self.identifier, path, "shard_size", "side_files")
        return SafetensorsWriter(path, resume=request.resume)
