"""Folders of diffusers pipelines: `model_index.json` names the components, each of which has a folder of its own."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.folders.sharded import find_weights
from sd_mecha.storage.folders.side_files import CONFIG, PIPELINE
from sd_mecha.storage.foreign import BEFORE_TEXT
from sd_mecha.storage.locations import LocalLocation, Location
from sd_mecha.storage.strict_json import brief, parse_object

_MADE = "_sd_mecha_made"
"""Key of a text: the components that a merge made, as against those that it copied.

diffusers passes over keys that begin with an underscore; but not everywhere where the value is a list.
"""
_MAX_PIPELINE = 1 << 20
_NAME = re.compile(r"[A-Za-z]\w*")
_NO_MODEL = re.compile("Scheduler|Tokenizer|Processor|Extractor")  # in the names of classes that have no weights
_READABLE = re.compile(r".*\.(safetensors|bin)(\..*json)?")  # weights and their indexes, were they whole

_logger = logging.getLogger("sd_mecha")


def is_pipeline(location: Location) -> bool:
    """Whether a place is the folder of a pipeline, or the `model_index.json` in it."""
    if location.is_folder():
        return location.child(PIPELINE).is_file()
    return location.basename == PIPELINE and location.head.lstrip(BEFORE_TEXT).startswith(b"{")


def pipeline_folder(location: Location) -> Location:
    """The folder of a pipeline, from what `is_pipeline` says yes to."""
    return location if location.is_folder() else location.parent()


def components(folder: Location) -> dict[str, Location]:
    """The folders of the components of a pipeline, by name, in the order in which the pipeline names them.

    Raises:
        FileFormatError: `model_index.json` breaks a rule.
    """
    return {component: folder.child(component) for component in _classes(folder)}


def _classes(folder: Location) -> dict[str, str]:
    """The class of each component that a pipeline names."""
    name, pipeline = _listing(folder)
    found = {}
    for component, value in pipeline.items():
        if component.startswith("_") or not _is_component(value):
            continue
        if not _NAME.fullmatch(component):
            raise FileFormatError(
                f"{name}: bad name of a component: got {brief(component)}, expected letters, digits and underscores"
            )
        found[component] = value[1]
    if not found:
        raise FileFormatError(
            f"{name}: names no component: got {brief(sorted(pipeline))}, expected names with a library and a class each"
        )
    return found


def component_weights(folder: Location) -> dict[str, Location]:
    """What the components of a pipeline keep their weights in; schedulers and tokenizers have none.

    Raises:
        FileFormatError: `model_index.json` breaks a rule, no component has weights, one has files of weights of which
            none or several can be taken.
    """
    found = {}
    parts = _classes(folder)
    for name, kind in parts.items():
        weights = find_weights(folder.child(name))
        if weights is not None:
            found[name] = weights
        elif not _NO_MODEL.search(kind):
            _check_weightless(folder.child(name), kind)
    if not found:
        raise FileFormatError(
            f"{folder.name}: none of its components has weights (looked in {', '.join(parts)}); download them, too"
        )
    return found


def _check_weightless(place: Location, kind: str) -> None:
    """Refuse what was not downloaded in full; tell of what has no weights at all, as some leave an encoder out."""
    names = place.children()
    if any(map(_READABLE.fullmatch, names)):
        raise FileFormatError(
            f"{place.name}: component of class {brief(kind)} without weights: got {brief(names)}, expected a file of "
            f"weights or an index; download it, or set {place.basename} to [null, null] in {PIPELINE}"
        )
    _tell_weightless(place.name, place.basename)


@lru_cache(maxsize=256)  # a merge looks into a pipeline several times
def _tell_weightless(place: str, component: str) -> None:
    _logger.warning(
        "%s: component %r has no weights that can be read; it is not part of the model and goes along as it is",
        place, component,
    )  # fmt: skip


def absent_components(folder: Location) -> list[str]:
    """The components of a pipeline of which there is no file; none where folders cannot be listed.

    Raises:
        FileFormatError: `model_index.json` breaks a rule.
    """
    if not isinstance(folder, LocalLocation) and not folder.children():
        return []
    return [name for name, place in components(folder).items() if not place.children()]


def unconfigured_components(folder: Location) -> list[str]:
    """The components of a pipeline that have weights, but no configuration that says what they are the weights of.

    Raises:
        FileFormatError: `model_index.json` breaks a rule, or no component has weights.
    """
    return [name for name in component_weights(folder) if not folder.child(f"{name}/{CONFIG}").is_file()]


def made_components(folder: Location) -> frozenset[str] | None:
    """The components that the merge which wrote a pipeline made; None if it does not say so, as those of others.

    Raises:
        FileFormatError: `model_index.json` breaks a rule.
    """
    _, pipeline = _listing(folder)
    made = pipeline.get(_MADE)
    return frozenset(made.split()) if isinstance(made, str) else None


def with_made(folder: Location, made: Iterable[str]) -> bytes:
    """The `model_index.json` of a pipeline for one that is made after it: the same but for what the merge made.

    Raises:
        FileFormatError: it breaks a rule.
    """
    _, pipeline = _listing(folder)
    return (json.dumps({**pipeline, _MADE: " ".join(sorted(made))}, indent=2) + "\n").encode()


def _listing(folder: Location) -> tuple[str, dict[str, Any]]:
    """What messages call the `model_index.json` of a pipeline, and what is in it."""
    listing = folder.child(PIPELINE)
    return listing.name, parse_object(listing.read(_MAX_PIPELINE), listing.name)


def _is_component(value: object) -> bool:
    """Whether this stands for `[library, class]` of something that may have weights."""
    if type(value) is not list or len(value) != 2:
        return False
    library, kind = value
    return type(library) is str and type(kind) is str
