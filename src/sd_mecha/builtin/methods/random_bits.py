"""Random numbers that depend on where they stand, not on when they are drawn.

The number for an element is a hash of a seed, the key of its tensor, the position of its model and its index. So it
is the same for every tile size, number of threads and order of merging, and on every device.
"""

from __future__ import annotations

import hashlib
import secrets
from functools import lru_cache

import torch
from torch import Tensor

SEGMENT = 1 << 30  # indices that one set of hash keys serves; a tensor may have more elements
_COUNTED = 1 << 17  # indices that are counted once and kept: as many as a tile on the CPU has at most
_ROUNDS = ((16, 0x21F0AAAD), (15, 0xD35A2D97))
"""Shift and multiplier of each round: the integer hash lowbias32 of Chris Wellons, without its last step, which
improves low bits alone."""


def draw_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbits(32)


def uniform(seed: int | None, key: str, stream: int, start: int, like: Tensor) -> Tensor:
    """Random numbers in [0, 1) for a flat tile, independent of each other and of every other stream.

    Args:
        seed: any integer; None counts as 0.
        key: of the tensor in its state dict.
        stream: which of several independent sequences, for instance the position of a model.
        start: index of the tile's first element in its tensor.
        like: a tensor of the tile's shape, on the wanted device.

    Returns:
        A float32 tensor of that shape. Its values are multiples of 2**-24.
    """
    bits = random_bits(seed, key, stream, start, like)
    return bits.bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-24).add_(0.5)


def at_least(seed: int | None, key: str, stream: int, start: int, like: Tensor, limit: float) -> Tensor:
    """Where random numbers in [0, 1) are `limit` or more: int32 with all bits set there, and none elsewhere.

    Such a mask is applied to the bits of other numbers; that takes a tenth of the time of a choice by truth values.
    The numbers have 32 bits. Arguments: see `uniform`; `limit` is in [0, 1].
    """
    first = round(limit * 2.0**32) - (1 << 31)
    if first >= 1 << 31:
        return torch.zeros_like(like, dtype=torch.int32)
    # a comparison in place gives 1 and 0, without truth values
    return random_bits(seed, key, stream, start, like).ge_(first).neg_()


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Elements of `x` where all bits of an int32 mask are set, 0 where none are."""
    if not x.is_floating_point():
        return torch.where(mask != 0, x, 0)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    return x.view(bits).bitwise_and(mask.to(bits)).view(x.dtype)


def random_bits(seed: int | None, key: str, stream: int, start: int, like: Tensor) -> Tensor:
    """Random int32 numbers, all of them equally likely, for a flat tile. Arguments: see `uniform`."""
    if like.numel() == 0:
        return torch.empty_like(like, dtype=torch.int32)
    parts, stop = [], start + like.numel()
    for begin in range(start - start % SEGMENT, stop, SEGMENT):
        first, last = max(start, begin), min(stop, begin + SEGMENT)
        counter = _count(last - first, like.device).add(first - begin)
        parts.append(_hash(counter, *_keys(seed, key, stream, begin // SEGMENT)))
    return (torch.cat(parts) if len(parts) != 1 else parts[0]).reshape(like.shape)


def _count(count: int, device: torch.device) -> Tensor:
    """0, 1, 2, ...; not to be written to."""
    if device.type != "cpu" or count > _COUNTED:
        return torch.arange(count, dtype=torch.int32, device=device)
    return _counted()[:count]


@lru_cache
def _counted() -> Tensor:
    return torch.arange(_COUNTED, dtype=torch.int32)


@lru_cache
def _keys(seed: int | None, key: str, stream: int, segment: int) -> tuple[int, ...]:
    """A number of 31 bits for each round of the hash."""
    name = f"{seed or 0} {stream} {segment} {key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=4 * len(_ROUNDS)).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") >> 1 for i in range(0, len(digest), 4))


def _hash(x: Tensor, *keys: int) -> Tensor:
    """Mix non-negative 32-bit integers in place: no two become the same, whatever the keys are."""
    shifted = torch.empty_like(x)
    for position, ((by, factor), key) in enumerate(zip(_ROUNDS, keys, strict=True)):
        x ^= key
        torch.bitwise_right_shift(x, by, out=shifted)
        if position > 0:  # from here on numbers may be negative, and zeros have to come in
            shifted &= (1 << (32 - by)) - 1
        x ^= shifted
        x *= factor - (factor >> 31 << 32)
    return x
