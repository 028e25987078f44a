"""The GGUF format, in one file, as llama.cpp and programs for quantised image models use it."""

from __future__ import annotations

from pathlib import Path

from sd_mecha.errors import OptionError
from sd_mecha.extensions.model_formats import LocationFormat, OutputRequest, register_model_format
from sd_mecha.storage.gguf.header import MAGIC
from sd_mecha.storage.gguf.layout import taken_over
from sd_mecha.storage.gguf.reader import GgufReader
from sd_mecha.storage.gguf.writer import GgufWriter
from sd_mecha.storage.locations import Location


@register_model_format
class GgufFormat(LocationFormat):
    """Files that begin like a GGUF file; quantised tensors are read as floats, and written as plain ones."""

    identifier = "gguf"
    suffixes: tuple[str, ...] = (".gguf",)
    quantised = False

    def recognises(self, location: Location) -> bool:
        return location.head.startswith(MAGIC)

    def open(self, location: Location) -> GgufReader:
        return GgufReader(location.open())

    def writer_for(self, path: Path, request: OutputRequest) -> GgufWriter:
        """The writer; architecture, tokenizer and the like come from the side files, else from the first GGUF input."""
        request.refuse(self.identifier, path, "shard_size")
        source = _source(request)
        keys = {}
        if source is not None:
            file = source.open()
            try:
                keys = taken_over(file)
            finally:
                file.close()
        return GgufWriter(path, keys=keys, quantised=self.quantised, resume=request.resume)


@register_model_format
class QuantisedGgufFormat(GgufFormat):
    """GGUF files whose matrices are Q8_0; for outputs only, and only by name."""

    identifier = "gguf-q8_0"
    suffixes = ()
    quantised = True

    def recognises(self, location: Location) -> bool:
        return False  # GgufFormat reads them


def _source(request: OutputRequest) -> Location | None:
    """The file whose keys go along."""
    named = request.side_files
    if named is None:
        return next((location for location in request.inputs if location.head.startswith(MAGIC)), None)
    found = [named.child(name) for name in named.children() if name.lower().endswith(".gguf")] or [named]
    if not found[0].head.startswith(MAGIC):
        raise OptionError(
            f"side_files={named.name!r} has no GGUF file; name one whose architecture and tokenizer the output should "
            "have, or leave it out"
        )
    return found[0]
