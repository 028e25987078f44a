"""Random numbers that depend on where they stand, not on when they are drawn.

The number for an element is a hash of a seed, the key of its tensor, the position of its model and its index. So it
is the same for every tile size, number of threads and order of merging, and on every device.
"""

from __future__ import annotations

import hashlib
import secrets

import torch
from torch import Tensor

SEGMENT = 1 << 30  # indices that one pair of hash keys serves; a tensor may have more elements
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
"""Shift and multiplier of each round: the integer hash triple32 of Chris Wellons, which is as good as unbiased."""


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
    if like.numel() == 0:
        return torch.empty_like(like, dtype=torch.float32)
    parts, stop = [], start + like.numel()
    for begin in range(start - start % SEGMENT, stop, SEGMENT):
        first, last = max(start, begin), min(stop, begin + SEGMENT)
        counter = torch.arange(first - begin, last - begin, dtype=torch.int32, device=like.device)
        parts.append(_hash(counter, *_keys(seed, key, stream, begin // SEGMENT)))
    bits = torch.cat(parts) if len(parts) != 1 else parts[0]
    return _shifted(bits, 8).to(torch.float32).mul_(2.0**-24).reshape(like.shape)


def _keys(seed: int | None, key: str, stream: int, segment: int) -> tuple[int, ...]:
    """One 32-bit number for each round of the hash."""
    name = f"{seed or 0} {stream} {segment} {key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=4 * len(_ROUNDS)).digest()
    return tuple(_signed(int.from_bytes(digest[i : i + 4], "little")) for i in range(0, len(digest), 4))


def _hash(x: Tensor, *keys: int) -> Tensor:
    """Mix 32-bit integers in place: a bijection for each choice of keys."""
    for (shift, factor), key in zip(_ROUNDS, keys, strict=True):
        x ^= key
        x ^= _shifted(x, shift)
        x *= _signed(factor)
    x ^= _shifted(x, 14)
    return x


def _shifted(x: Tensor, by: int) -> Tensor:
    """The bits of 32-bit integers moved right, with zeros coming in."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
