"""The pipelines of diffusers: folders of components, read and written as one model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from sd_mecha.builtin.formats.folders import check_kind, files_along, open_weights, reference
from sd_mecha.errors import OptionError, OutputError
from sd_mecha.extensions.model_formats import LocationFormat, OutputRequest, register_model_format
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.folders.joined import close_all, join_components
from sd_mecha.storage.folders.pipelines import (
    component_weights,
    components,
    is_pipeline,
    made_components,
    pipeline_folder,
    with_made,
)
from sd_mecha.storage.folders.sharded import files_of, stem_of
from sd_mecha.storage.folders.sharded_writer import Part, ShardedWriter, SideFile
from sd_mecha.storage.folders.side_files import PIPELINE, side_files
from sd_mecha.storage.locations import Location

_logger = logging.getLogger("sd_mecha")


@register_model_format
class DiffusersFormat(LocationFormat):
    """A folder with a `model_index.json`. The keys are `COMPONENT.KEY`, such as `unet.conv_in.weight`."""

    identifier = "diffusers"

    def recognises(self, location: Location) -> bool:
        return is_pipeline(location)

    def open(self, location: Location) -> Reader:
        folder = pipeline_folder(location)
        readers: dict[str, Reader] = {}
        try:
            for name, weights in component_weights(folder).items():
                readers[name] = open_weights(weights)
            return join_components(folder.name, readers, made_components(folder))
        except BaseException:
            close_all(readers.values())
            raise

    def writer_for(self, path: Path, request: OutputRequest) -> ShardedWriter:
        check_kind(path, self)
        request.refuse_scales(self.identifier, path)
        folder = reference(request, PIPELINE)
        if folder is None:
            raise OptionError(
                f"output {str(path)!r}: a pipeline is made after another one, and no model of the recipe is a "
                "pipeline; name one with side_files"
            )
        weights = component_weights(folder)
        parts = [Part(stem_of(place), name, f"{name}.") for name, place in weights.items()]
        along = _Along(str(path), folder, weights, complete=request.side_files is not None)
        return ShardedWriter(path, parts, request.shard_size, along, request.resume)


class _Along:
    """What goes along with a pipeline.

    Args:
        output: what messages call the output.
        folder: the pipeline that it is made after.
        weights: the components of that one with their weights.
        complete: whether components that the recipe does not make are copied from there.
    """

    def __init__(self, output: str, folder: Location, weights: Mapping[str, Location], complete: bool) -> None:
        self._output = output
        self._folder = folder
        self._weights = weights
        self._complete = complete

    def __call__(self, entries: Mapping[str, TensorEntry]) -> Iterator[SideFile]:
        made: dict[str, dict[str, TensorEntry]] = {}
        for key, entry in entries.items():
            component, _, name = key.partition(".")
            made.setdefault(component, {})[name] = entry
        absent = [name for name in self._weights if name not in made]
        if absent and not self._complete:
            raise OutputError(
                f"output {self._output!r}: the recipe makes nothing of {', '.join(absent)}, which the pipeline "
                f"{self._folder.name!r} has; side_files={self._folder.name!r} copies from there what is not made"
            )
        for name, place in side_files(self._folder, deep=False):
            yield name, with_made(self._folder, made) if name == PIPELINE else place.open
        for name, place in components(self._folder).items():
            if name in made:
                yield from files_along(place, made[name], f"{name}/")
            else:  # its configuration fits what is copied with it
                found = side_files(place, weights=name not in self._weights)
                yield from ((f"{name}/{inside}", file.open) for inside, file in found)
        for name in absent:
            _logger.info("%s: %s is copied from %s", self._output, name, self._folder.name)
            for file in files_of(self._weights[name]):
                yield f"{name}/{file.basename}", file.open
