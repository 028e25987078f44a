"""Folders that are nearly models: what is missing, so that the message names it."""

from __future__ import annotations

import re

from sd_mecha.storage.folders.sharded import is_known_weights
from sd_mecha.storage.links import broken_link
from sd_mecha.storage.locations import LocalLocation, Location
from sd_mecha.storage.pytorch.distributed import METADATA

_SHARD = re.compile(r"([^.]+)(\.\w+)?-\d+-of-\d+(\.\w+)?\.(safetensors|bin)")
_CHUNKS = ".distcp"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".json", _CHUNKS, METADATA)


def describe_folder(folder: Location) -> str:
    """What is to be said of a folder in which no format sees a model, behind "it is a folder"."""
    names = folder.children()
    return _links(folder, names) or _shards(names) or _chunks(names) or "; name a model file in it"


def _links(folder: Location, names: list[str]) -> str | None:
    if not isinstance(folder, LocalLocation):
        return None
    broken = [name for name in names if name.endswith(_WEIGHTS) and broken_link(folder.path / name)]
    if not broken:
        return None
    first = min(broken, key=lambda name: not is_known_weights(name))
    return f" in which {broken_link(folder.path / first)}; fetch that file again, or name another in it"


def _shards(names: list[str]) -> str | None:
    for name in names:
        if found := _SHARD.fullmatch(name):
            stem, before, behind, ending = found.groups()
            index = f"{stem}.{ending}.index{before or behind or ''}.json"
            if index not in names:
                return f" with shards of a model, such as {name!r}, without their index {index!r}; fetch that too"
    return None


def _chunks(names: list[str]) -> str | None:
    chunk = next((name for name in names if name.endswith(_CHUNKS)), None)
    if chunk is None or METADATA in names:
        return None
    return (
        f" with files of torch.distributed.checkpoint, such as {chunk!r}, without {METADATA!r}, which says what they "
        "hold; fetch that too"
    )
