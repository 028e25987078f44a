"""Models whose names show that matrices are quantised: read as floats where it is known how, else refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.dtypes import FLOAT4, IS_STORAGE_ONLY, dtype_name
from sd_mecha.storage.quantised.bitsandbytes import DequantisedReader, find_quantised
from sd_mecha.storage.quantised.scaled_fp8 import ScaledReader, find_scales, is_fp8

# A name's ending -> endings that stand beside it, and what does such a thing.
_UNREAD: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("qweight", ("qzeros", "scales", "g_idx"), "GPTQ"),
    ("qweight", ("qzeros", "scales"), "AWQ or GPTQ"),
    ("qweight", ("wscales",), "SVDQuant (Nunchaku)"),
    ("weight_packed", ("weight_scale",), "compressed-tensors"),
    ("weight", ("weight_scale", "weight_scale_2"), "NVFP4 (ModelOpt)"),
    ("weight", ("weight_scale",), "compressed-tensors or the like"),
    ("weight", ("weight_scales",), "EETQ or the like"),
    ("float8_data", ("scale",), "flux-fp8-api"),
    ("weight._data", ("weight._scale",), "quanto"),
    ("_weight_qdata", ("_weight_scale",), "torchao"),
    ("W_q", ("scale", "zero"), "HQQ"),
    ("codes", ("codebooks", "scales"), "AQLM"),
    ("Qidxs", ("SU", "SV"), "QuIP#"),
    ("_blocks", ("_scales",), "MXFP4"),
)
_INSTEAD = "use the model that it was made from, or save it as floats with the program that made it"
_A_SCALE = re.compile("(^|_)[qw]?scales?(_|$)")
_OF_A_WEIGHT = re.compile(r"scales?(_inv|_w)?|w_?scales?|.*weight.*")  # names that are such
_OF_ACTIVATIONS = re.compile("input|output|act")


def as_floats(reader: Reader) -> Reader:
    """The same model with floats for the matrices that bitsandbytes, or fp8 with scales, keeps in fewer bits.

    Raises:
        FileFormatError: they are quantised in another way, or what goes with a matrix does not fit it.
    """
    for key, entry in reader.entries.items():
        if entry.dtype is FLOAT4:
            raise FileFormatError(
                f"{reader.name}: {key!r} is {dtype_name(entry.dtype)} (F4), which torch cannot convert; {_INSTEAD}"
            )
    quantised = find_quantised(reader)
    if quantised:
        reader = DequantisedReader(reader, quantised)
    scales = find_scales(reader.entries, reader.name)
    if scales:
        reader = ScaledReader(reader, scales)
    _refuse_others(reader.entries, reader.name)
    _refuse_unknown_scales(reader.entries, reader.name)
    return reader


def _refuse_others(entries: Mapping[str, TensorEntry], name: str) -> None:
    for key, entry in entries.items():
        if entry.dtype.is_floating_point and entry.dtype not in IS_STORAGE_ONLY:
            continue  # numbers that mean what they say
        for ending, others, scheme in _UNREAD:
            beside = [key.removesuffix(ending) + other for other in others]
            if key.endswith(ending) and all(other in entries for other in beside):
                raise FileFormatError(
                    f"{name}: {key!r}, beside which is {beside[0]!r}, is quantised with {scheme}, which is not read "
                    f"here; {_INSTEAD}"
                )


def _refuse_unknown_scales(entries: Mapping[str, TensorEntry], name: str) -> None:
    """Refuse matrices that are still in eight bits, and have a scale by its name."""
    for key, entry in entries.items():
        if is_fp8(entry.dtype):
            continue  # a parameter like any other, in a model that was cast as a whole
        for owner in _owners(key):
            matrix = entries.get(owner)
            if matrix is not None and _may_scale(key, entry, owner, matrix):
                raise FileFormatError(
                    f"{name}: {owner!r} is {dtype_name(matrix.dtype)} of shape {matrix.shape}, and {key!r} of shape "
                    f"{entry.shape} seems to be its scale, in a way that is not read here; {_INSTEAD}"
                )


def _may_scale(key: str, entry: TensorEntry, owner: str, matrix: TensorEntry) -> bool:
    """Whether a tensor, by its name the scale of a matrix, can be that, going by what both are."""
    is_eight_bits = is_fp8(matrix.dtype) or matrix.dtype == torch.int8
    if not is_eight_bits or len(matrix.shape) < 2 or entry.shape == matrix.shape or entry.numel > matrix.numel:
        return False
    _, _, last = owner.rpartition(".")
    if is_fp8(matrix.dtype) and last == "weight" and key == f"{owner.removesuffix(last)}scale":
        # what `find_scales` left alone is learned, unless no parameter is kept like that
        return not entry.dtype.is_floating_point or entry.dtype in IS_STORAGE_ONLY
    if "weight" in last or key == f"{owner}_scale_inv":
        return True
    return is_fp8(matrix.dtype) and key[len(owner)] == "_" and matrix.shape[0] > 1 and "emb" not in last


def _owners(key: str) -> Iterator[str]:
    """What a tensor would be the scale of, going by its name."""
    module, dot, last = key.rpartition(".")
    if _A_SCALE.search(last) and not _OF_ACTIVATIONS.search(last):
        yield from (key[: part.start()] for part in re.finditer("[._]", key) if part.start() >= len(module))
        yield f"{key.removesuffix('scale')}weight"  # in_proj_weight and in_proj_scale
        if _OF_A_WEIGHT.fullmatch(last):
            yield f"{module}{dot}weight"
