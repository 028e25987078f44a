"""What lies in the folder of a model beside its weights, and goes along when another model is made after it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sd_mecha.errors import MechaError
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import IS_STORAGE_ONLY, dtype_name, is_integral
from sd_mecha.storage.locations import LocalLocation, Location
from sd_mecha.units import such_as

CONFIG = "config.json"
PIPELINE = "model_index.json"
"""What makes a folder a pipeline."""

MAX_SIDE_FILE = 64 << 20
"""Bytes; what is larger is no side file. The largest tokenizers have half of that."""

_MAX_CONFIG = 4 << 20  # bytes; in memory they may be thirty times as many
_DEPTH = 3  # folders within folders
_MOST = 1000
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|pb|tflite|ot|npz|npy|part|tmp)"
    r"|.*\.index(\.[\w-]+)?\.json",
    re.IGNORECASE,
)
_HASH = re.compile(r"[0-9a-f]+(-\d+)?")  # what a hub's cache calls its files
_PLAIN = re.compile(r"[^.\\:/][^\\:/]*")  # names that are names on every system, and not hidden
_CACHES = frozenset({"__pycache__", "cache", "onnx", "openvino", "runs", "wandb", "logs"})
_USUAL = (
    CONFIG, PIPELINE, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "scheduler_config.json", "README.md", "LICENSE",
)  # fmt: skip
_HEADS = ("lm_head.weight", "embed_out.weight")
"""Matrices that a model may share with its embedding, and then does not store."""
_TIED = "tie_word_embeddings"
_DTYPES = ("torch_dtype", "dtype")

_logger = logging.getLogger("sd_mecha")


def side_files(folder: Location, deep: bool = True, weights: bool = False) -> Iterator[tuple[str, Location]]:
    """Relative path and place of every file that is neither weights nor an index, hidden, in a cache, or huge.

    Of links, only those to files in the folder of the model count, and those into where a hub's cache keeps its files.
    The folder of a component that its pipeline names may be a link itself.

    Args:
        folder: where they lie. Where it cannot be listed, the usual names are tried.
        deep: whether those in folders within it count.
        weights: whether weights count as well, of whatever size.
    """
    found = _listed(folder, "", _DEPTH if deep else 0, weights)
    if not isinstance(folder, LocalLocation) and not folder.children():
        found = ((name, folder.child(name)) for name in _USUAL)
    count = 0
    is_own = _ownership(folder)
    links: list[str] = []
    for name, place in found:
        if isinstance(place, LocalLocation) and (place.is_folder() or not is_own(place.path)):
            links.append(name)
            continue
        if not place.is_file():
            continue
        count += 1
        if count > _MOST:
            _logger.warning("%s: holds more than %d files; the others do not go along", folder.name, _MOST)
            break
        source = place.open()
        size = source.size
        source.close()
        if size > MAX_SIDE_FILE and not (weights and _WEIGHTS.fullmatch(place.basename)):
            _logger.warning("%s: has %d bytes and does not go along with the output", place.name, size)
        else:
            yield name, place
    if links:
        _logger.warning(
            "%s: links to folders, or out of the folder of the model, do not go along: %s", folder.name, such_as(links)
        )


def _listed(folder: Location, inside: str, depth: int, weights: bool) -> Iterator[tuple[str, Location]]:
    for name in folder.children():
        if not _PLAIN.fullmatch(name) or (_WEIGHTS.fullmatch(name) and not weights) or name.lower() in _CACHES:
            continue
        place = folder.child(name)
        linked = isinstance(place, LocalLocation) and place.path.is_symlink()
        if not place.is_folder() or (linked and depth):
            yield inside + name, place
        elif depth:
            yield from _listed(place, f"{inside}{name}/", depth - 1, weights)


def _ownership(folder: Location) -> Callable[[Path], bool]:
    """What says whether a path leads to a file of the model in a folder."""
    if not isinstance(folder, LocalLocation):
        return lambda path: True
    in_pipeline = folder.parent().child(PIPELINE).is_file()
    top = Path(os.path.realpath(folder.path.parent if in_pipeline else folder.path))
    blobs = [at.parents[1] / "blobs" for at in (top, *top.parents) if at.parent.name == "snapshots"]
    caches = {Path(os.path.realpath(place)) for place in blobs}
    component = Path(os.path.realpath(folder.path)) if in_pipeline and _is_component(folder) else None

    def is_own(path: Path) -> bool:
        real = Path(os.path.realpath(path))
        above = real.parent
        if any(real.is_relative_to(place) for place in (top, *blobs)) or above == component:
            return True
        cached = above in caches or (above.name == "blobs" and above.parent.name.startswith("models--"))
        return cached and _HASH.fullmatch(real.name) is not None  # else `blobs` might lead to anything

    return is_own


def _is_component(folder: LocalLocation) -> bool:
    """Whether the pipeline around a folder names it, and it looks like a part of a model, not like somebody's files."""
    try:
        listing = json.loads(folder.parent().child(PIPELINE).read(_MAX_CONFIG))
    except (ValueError, RecursionError, MechaError):
        return False
    value = listing.get(folder.basename) if isinstance(listing, dict) else None
    named = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    return named and any(folder.child(name).is_file() for name in _USUAL if name.endswith(".json"))


def fitted_config(raw: bytes, entries: Mapping[str, TensorEntry], before: Collection[str], name: str) -> bytes:
    """A `config.json` that says of the output what it said of the model that it comes from.

    The dtype becomes that of the output, where all its floats have the same. Whether the head shares the matrix of the
    embedding is said where the output stores a head and the other model did not, or the other way round. How the
    other model was quantised is left out where the output is not. Everything else stays; without a change the
    text does, too.

    Args:
        raw: the text.
        entries: the tensors of the output.
        before: names of the tensors of the model that the config comes from.
        name: what messages call the file.
    """
    try:
        config = json.loads(raw) if len(raw) <= _MAX_CONFIG else None
        if isinstance(config, dict):
            return _fitted(raw, config, entries, before, name)
    except (ValueError, RecursionError):
        pass
    _logger.warning("%s: is no JSON object of at most %d bytes and goes along as it is", name, _MAX_CONFIG)
    return raw


def _fitted(
    raw: bytes, config: dict[str, Any], entries: Mapping[str, TensorEntry], before: Collection[str], name: str
) -> bytes:
    old = json.dumps(config)
    if config.get("quantization_config") is not None and _is_plain(entries.values()):
        _logger.info("%s: the output is not quantised: quantization_config is left out", name)
        del config["quantization_config"]
    dtype = common_dtype(entries.values())
    if dtype is not None:
        _set_dtype(config, dtype_name(dtype))
    head = _other_head(entries, before)
    if head is not None:
        tied = head not in entries
        if tied and config.get(_TIED) is not True:
            _logger.warning(
                "%s: %r is not made, which this model has: the %s of the output says %s: true, so that the embedding "
                "takes its place and what the head has learnt is lost; only models that all have it keep it",
                name, head, CONFIG, _TIED,
            )  # fmt: skip
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or _TIED in part):
                part[_TIED] = tied
    if json.dumps(config) == old:
        return raw
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")  # of a surrogate


def common_dtype(entries: Iterable[TensorEntry]) -> torch.dtype | None:
    """The dtype of all floats, None where they differ or there are none."""
    found = {entry.dtype for entry in entries if not is_integral(entry.dtype)}
    return found.pop() if len(found) == 1 else None


def _is_plain(entries: Iterable[TensorEntry]) -> bool:
    """Whether nothing large is stored in another way than as floats that one can compute with."""
    return not any(
        (is_integral(entry.dtype) or entry.dtype in IS_STORAGE_ONLY) and len(entry.shape) > 1 for entry in entries
    )


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """Replace the dtype of a model, and of the models within it."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            _set_dtype(value, name)
        elif key in _DTYPES and isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype):
            config[key] = name


def _other_head(entries: Collection[str], before: Collection[str]) -> str | None:
    """The head that the output shares and the other model stores, or the other way round; None: as before."""
    return next((head for head in _HEADS if before and (head in entries) != (head in before)), None)
