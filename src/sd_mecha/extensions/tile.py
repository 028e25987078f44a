"""Where in its tensor a tile lies; tiled methods that declare **kwargs receive it as `tile`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements `start` to `stop` (flat, row-major) of a tensor of `numel` elements and that shape."""

    start: int
    stop: int
    numel: int
    shape: tuple[int, ...]
