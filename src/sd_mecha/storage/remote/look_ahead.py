"""The choice of what to read ahead."""

from __future__ import annotations

from collections.abc import Callable


def choose(
    known: Callable[[int], bool], first: int, following: int, most: int, streak: int, longest: int
) -> tuple[int, int] | None:
    """After a read of the blocks `first` to `following`, the range of those to fetch next, if it is worth while yet.

    They are as many as were read in a row before. A small rest is left to the next time.

    Args:
        known: whether a block is there, on its way, or was read before.
        first, following: the blocks that were read.
        most: blocks that are fetched before they are asked for, at most.
        streak: how far back is looked.
        longest: blocks that are asked for at once, at most.
    """
    last = following + min(_streak(known, first, following, streak), most)
    start = next((number for number in range(following, last) if not known(number)), last)
    count = last - start
    if start != following and count * 2 < last - following:
        return None
    return start, start + (count if count < longest else count - count % longest)


def _streak(known: Callable[[int], bool], first: int, following: int, most: int) -> int:
    """How many blocks up to `following` were read in a row; none if the one before `first` is not known."""
    count = 0
    while count < most and first > count and known(first - count - 1):
        count += 1
    return count and count + following - first
