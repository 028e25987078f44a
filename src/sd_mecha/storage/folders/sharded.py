"""Models in several files with an index, and the folders that Hugging Face's libraries keep models in.

The index is a JSON object: `weight_map` gives for each tensor the file that holds it, in the same folder. It decides:
a tensor that it does not name is no part of the model, as those libraries have it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, NoReturn

from sd_mecha.errors import FileFormatError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.contract import ByteSource, Reader
from sd_mecha.storage.folders.joined import JoinedReader, close_all
from sd_mecha.storage.foreign import BEFORE_TEXT
from sd_mecha.storage.links import broken_link
from sd_mecha.storage.locations import LocalLocation, Location
from sd_mecha.storage.strict_json import brief, parse_object

OpenModel = Callable[[Location], Reader]
"""Opens a file, whatever its format."""

MAX_INDEX = 25_000_000
"""Bytes of an index: twice that of the largest models. Python takes up to 16 times as much to parse one."""
_MAX_VALUES = 1_000_000  # of an index; each costs memory, however short it is

STEMS = ("model", "diffusion_pytorch_model")
"""What files of weights are called before their ending: by transformers, and by diffusers."""

_TORCH = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
_INDEX_NAME = re.compile(r".*\.index(\.[\w-]+)?\.json")
_SINGLE = re.compile(r"[^.\\:/][^\\:/]*\.safetensors")
_FIRST_VARIANTS = ("", "fp16")
_VARIANT = r"(?:\.([\w-]+?))?"
_KNOWN_WEIGHTS = re.compile(  # libraries have put the variant before the number, or before `index`, and after it
    rf"(?:{'|'.join({*STEMS, *_TORCH.values()})}){_VARIANT}(-\d+-of-\d+)?{_VARIANT}\.(?:safetensors|bin)"
    rf"(?:{_VARIANT}\.index{_VARIANT}\.json)?"
)
_USUAL_VARIANT = re.compile(r"(fp|bf|int)(4|8|16|32)([_-]?e4m3(fn)?|[_-]?e5m2)?|\d+-?bit|(non_)?ema")

_logger = logging.getLogger("sd_mecha")


def is_index(location: Location) -> bool:
    """Whether a file is an index, by its first bytes; its name decides where they do not tell."""
    head = location.head.lstrip(BEFORE_TEXT)
    if not head.startswith(b"{") or b"\0" in head:
        return False
    return b'"weight_map"' in head or bool(_INDEX_NAME.fullmatch(location.basename))


def find_weights(folder: Location) -> Location | None:
    """The file or index that a folder keeps its model in, None if there is none.

    Raises:
        FileFormatError: there are several variants, and none goes before the others.
    """
    found = weight_choices(folder)
    if len(found) > 1:
        names = ", ".join(brief(place.basename) for place in found)
        _fail(folder.name, "several variants of a model", names, "one; name the file or index, or keep one only")
    return found[0] if found else None


def weight_choices(folder: Location) -> list[Location]:
    """The files or indexes that a folder may keep its model in: several if they are variants that are all alike.

    Args:
        folder: on this computer, or at an address; where that cannot be listed, the usual names are tried.

    Safetensors go before pickles, and full precision before fp16, which goes before other variants.
    """
    listed = set(folder.children())
    unlisted = not listed and not isinstance(folder, LocalLocation)

    def first(variant: str) -> list[Location]:
        places = (folder.child(name) for name in _weight_names(variant) if name in listed or unlisted)
        return list(islice((place for place in places if place.is_file()), 1))

    for variant in _FIRST_VARIANTS:
        if found := first(variant):
            return found
    others = {variant for name in listed if (variant := _variant(name))}
    if found := [place for variant in sorted(others) for place in first(variant)]:
        return found
    single = [name for name in listed if _SINGLE.fullmatch(name)]
    return [folder.child(single[0])] if len(single) == 1 and "config.json" in listed else []


def is_known_weights(name: str) -> bool:
    """Whether a library takes a file of that name for the weights of a folder, for some of them, or for their index.

    A variant that is no usual one is a name that somebody gave.

    >>> is_known_weights("pytorch_model-00001-of-00002.bin"), is_known_weights("lora.safetensors")
    (True, False)
    >>> is_known_weights("model.bf16.safetensors"), is_known_weights("model.epoch5.safetensors")
    (True, False)
    """
    known = _KNOWN_WEIGHTS.fullmatch(name)
    return known is not None and all(map(_USUAL_VARIANT.fullmatch, filter(None, known.group(1, 3, 4, 5))))


def stem_of(weights: Location) -> str:
    """What the library of a model calls its files before the ending.

    >>> from sd_mecha.storage.locations import LocalLocation
    >>> stem_of(LocalLocation("unet/diffusion_pytorch_model.fp16.safetensors"))
    'diffusion_pytorch_model'
    """
    return "diffusion_pytorch_model" if weights.basename.startswith("diffusion_pytorch_model") else "model"


def open_sharded(index: Location, open_shard: OpenModel) -> JoinedReader:
    """Open all files that an index names.

    Args:
        index: the index.
        open_shard: opens one of them.

    Raises:
        FileFormatError: the index breaks a rule, or does not say what its files hold.
        ModelNotFoundError: a file is missing.
    """
    source = index.open()
    readers: dict[str, Reader] = {}
    try:
        weight_map, metadata = read_index(source)
        for shard, place in _shards(index, weight_map).items():
            readers[shard] = _open_shard(index, place, shard, open_shard)
        places = _places(index.name, weight_map, readers)
    except BaseException:
        close_all(readers.values())
        source.close()
        raise
    first = next(iter(readers.values())).metadata if readers else {}
    return JoinedReader(index.name, places, list(readers.values()), {**first, **metadata}, source)


def files_of(weights: Location) -> list[Location]:
    """All files that what `find_weights` returned consists of.

    Raises:
        FileFormatError: it is an index that breaks a rule.
    """
    if not is_index(weights):
        return [weights]
    source = weights.open()
    try:
        weight_map, _ = read_index(source)
    finally:
        source.close()
    return [weights, *_shards(weights, weight_map).values()]


def read_index(source: ByteSource) -> tuple[dict[str, str], dict[str, str]]:
    """The map from tensors to files, and what of the metadata is text.

    Raises:
        FileFormatError: naming the rule that is broken.
    """
    name = source.name
    if source.size > MAX_INDEX:
        _fail(name, "index too large", f"{source.size} bytes", f"at most {MAX_INDEX}")
    raw = source.read(0, source.size)
    if raw.count(b",") > _MAX_VALUES:
        _fail(name, "index too large", f"{raw.count(b',')} commas", f"at most {_MAX_VALUES} values")
    index = parse_object(raw, name)
    if "weight_map" not in index:
        _fail(name, "weight_map missing", brief(sorted(index)), "an index with `weight_map`: tensor -> file")
    weight_map = index["weight_map"]
    if type(weight_map) is not dict:
        _fail(name, "weight_map is not an object", brief(weight_map), "tensor -> file")
    for key, shard in weight_map.items():
        if type(shard) is not str:
            _fail(name, "weight_map does not map to text", f"{brief(key)}: {brief(shard)}", "the name of a file")
        weight_map[key] = shard.removeprefix("./")
    metadata = index.get("metadata")
    texts = metadata if type(metadata) is dict else {}
    return weight_map, {key: text for key, text in texts.items() if type(text) is str}


def _shards(index: Location, weight_map: Mapping[str, str]) -> dict[str, Location]:
    """Where the files of an index lie, by the names that it gives them."""
    folder = index.parent()
    tensors: dict[str, str] = {}  # the first of each file
    for key, shard in weight_map.items():
        tensors.setdefault(shard, key)
    found = {}
    for shard in sorted(tensors):
        try:
            found[shard] = folder.child(shard)
        except FileFormatError as error:
            raise FileFormatError(
                f"{index.name}: tensor {brief(tensors[shard])}: names a file {brief(shard)}; expected one within the "
                "folder itself"
            ) from error
    return found


def _open_shard(index: Location, shard: Location, name: str, open_shard: OpenModel) -> Reader:
    try:
        if shard.is_folder():
            _fail(index.name, f"shard {brief(name)} is a folder", "a folder", "a file of tensors")
        if is_index(shard):
            _fail(index.name, f"shard {brief(name)} is an index itself", "an index", "a file of tensors")
        return open_shard(shard)
    except ModelNotFoundError as error:
        link = broken_link(shard.path) if isinstance(shard, LocalLocation) else None
        raise ModelNotFoundError(
            f"{index.name}: shard missing: the index names {brief(name)}, and "
            f"{link or 'there is no such file beside it'}; fetch it too, or correct the index"
        ) from error
    except OSError as error:
        if isinstance(error, MechaError):
            raise
        raise ModelAccessError(
            f"{index.name}: shard {brief(name)} cannot be opened: {error.strerror or error}"
        ) from error


def _places(index: str, weight_map: Mapping[str, str], readers: Mapping[str, Reader]) -> dict[str, tuple[Reader, str]]:
    """Where each tensor is, in the order of the files and of the data in each."""
    for key, shard in weight_map.items():
        if key not in readers[shard].entries:
            _fail(index, f"shard lacks a tensor that the index gives it: {brief(key)}", brief(shard), "it to hold that")
    places: dict[str, tuple[Reader, str]] = {}
    seen: dict[str, str] = {}
    unnamed = []
    for shard, reader in readers.items():
        for key in reader.entries:
            if key in seen:
                _fail(index, f"tensor in two shards: {brief(key)}", f"{brief(seen[key])} and {brief(shard)}", "one")
            seen[key] = shard
            if weight_map.get(key) == shard:
                places[key] = reader, key
            else:
                unnamed.append(key)
    if unnamed:
        _tell_unnamed(index, len(unnamed), unnamed[0])
    return places


@lru_cache(maxsize=256)  # a merge may open a model several times
def _tell_unnamed(index: str, count: int, example: str) -> None:
    _logger.warning(
        "%s: %d tensors in its files are not in the index and are left out, such as %r", index, count, example
    )


def _variant(name: str) -> str:
    """The variant that a file or index is, by its name; empty where there is none, or it is one file of several."""
    known = _KNOWN_WEIGHTS.fullmatch(name)
    if known is None or known[2]:
        return ""
    return next(filter(None, known.groups()), "")


def _weight_names(variant: str) -> list[str]:
    """Names of the files and indexes of a variant, the one to take first."""
    variant = variant and f".{variant}"
    files = [f"{stem}{variant}.safetensors" for stem in STEMS]
    indexes = [f"{stem}.safetensors.index{variant}.json" for stem in STEMS]
    names = [files[0], indexes[0], indexes[1], files[1]]  # the order in which each library looks
    for stem in _TORCH.values():
        names += [f"{stem}{variant}.bin", f"{stem}.bin.index{variant}.json"]
    if variant:  # as diffusers once had it
        names += [f"{STEMS[1]}.{ending}{variant}.index.json" for ending in ("safetensors", "bin")]
    return names


def _fail(source: str, rule: str, got: Any, expected: str) -> NoReturn:
    raise FileFormatError(f"{source}: {rule}: got {got}, expected {expected}")
