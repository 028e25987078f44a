"""Models whose names show that matrices are quantised: read as floats where it is known how, else refused."""

from __future__ import annotations

from collections.abc import Mapping

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.dtypes import IS_STORAGE_ONLY
from sd_mecha.storage.quantised.bitsandbytes import DequantisedReader, find_quantised
from sd_mecha.storage.quantised.scaled_fp8 import ScaledReader, find_scales

# A name's ending -> endings that stand beside it, and what does such a thing.
_UNREAD: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("qweight", ("qzeros", "scales", "g_idx"), "GPTQ"),
    ("qweight", ("qzeros", "scales"), "AWQ or GPTQ"),
    ("qweight", ("wscales",), "SVDQuant (Nunchaku)"),
    ("weight_packed", ("weight_scale",), "compressed-tensors"),
    ("weight", ("weight_scale", "weight_scale_2"), "NVFP4 (ModelOpt)"),
    ("weight._data", ("weight._scale",), "quanto"),
    ("W_q", ("scale", "zero"), "HQQ"),
    ("codes", ("codebooks", "scales"), "AQLM"),
    ("Qidxs", ("SU", "SV"), "QuIP#"),
    ("_blocks", ("_scales",), "MXFP4"),
)


def as_floats(reader: Reader) -> Reader:
    """The same model with floats for the matrices that bitsandbytes, or fp8 with scales, keeps in fewer bits.

    Raises:
        FileFormatError: they are quantised in another way, or what goes with a matrix does not fit it.
    """
    quantised = find_quantised(reader)
    if quantised:
        reader = DequantisedReader(reader, quantised)
    scales = find_scales(reader.entries, reader.name)
    if scales:
        reader = ScaledReader(reader, scales)
    _refuse_others(reader.entries, reader.name)
    return reader


def _refuse_others(entries: Mapping[str, TensorEntry], name: str) -> None:
    for key, entry in entries.items():
        if entry.dtype.is_floating_point and entry.dtype not in IS_STORAGE_ONLY:
            continue  # numbers that mean what they say
        for ending, others, scheme in _UNREAD:
            if key.endswith(ending) and all(key.removesuffix(ending) + other in entries for other in others):
                raise FileFormatError(
                    f"{name}: {key!r} is quantised with {scheme}, which is not read here; "
                    "use the model that it was made from, or save it as floats with the program that made it"
                )
