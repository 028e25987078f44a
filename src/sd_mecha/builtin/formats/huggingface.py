"""The folders of Hugging Face's transformers, and models in several files with an index."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from sd_mecha.builtin.formats.folders import check_kind, files_along, open_weights, reference
from sd_mecha.extensions.model_formats import LocationFormat, OutputRequest, register_model_format
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.folders.pipelines import is_pipeline
from sd_mecha.storage.folders.sharded import STEMS, is_index, stem_of, weight_choices
from sd_mecha.storage.folders.sharded_writer import Part, ShardedWriter, SideFile
from sd_mecha.storage.folders.side_files import CONFIG
from sd_mecha.storage.locations import Location

_logger = logging.getLogger("sd_mecha")


@register_model_format
class HuggingFaceFormat(LocationFormat):
    """A folder with one model in it, or the index of a model in several files."""

    identifier = "huggingface"

    def recognises(self, location: Location) -> bool:
        if location.is_folder():
            return not is_pipeline(location) and bool(weight_choices(location))
        return is_index(location)

    def open(self, location: Location) -> Reader:
        return open_weights(location)

    def writer_for(self, path: Path, request: OutputRequest) -> ShardedWriter:
        check_kind(path, self)
        request.refuse_scales(self.identifier, path)
        folder = reference(request, CONFIG)

        def along(entries: Mapping[str, TensorEntry]) -> Iterable[SideFile]:
            if folder is not None:
                return files_along(folder, entries)
            _logger.warning(
                "%s is written without a %s: no model of the recipe lies beside one; side_files names one", path, CONFIG
            )
            return ()

        weights = [] if folder is None else weight_choices(folder)
        stem = stem_of(weights[0]) if weights else STEMS[0]
        return ShardedWriter(path, [Part(stem)], request.shard_size, along, request.resume)
