"""Curves over depth: how much each block weighs, from the first (0) to the last (1).

The names are those of the presets that the tools for block-weighted merging share. Here each is a function, so that it
fits any number of blocks. Those made of steps (WRAP, MID, OUT, RING) are drawn on the 25 blocks of Stable Diffusion 1,
IN00 to IN11, M00, OUT00 to OUT11; another number of blocks takes the nearest of the 25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sd_mecha.errors import ParameterError
from sd_mecha.extensions.registry import suggestion

Curve = Callable[[float], float]

_LAST = 24  # of the 25 blocks that steps are drawn on


def smoothstep(t: float) -> float:
    return t * t * (3 - 2 * t)


def fold(t: float) -> float:
    """Back and forth between 0 and 1: what runs past 1 comes back."""
    t %= 2
    return min(t, 2 - t)


def reversed_(curve: Curve) -> Curve:
    return lambda t: 1 - curve(t)


def steps(*runs: tuple[int, float]) -> Curve:
    """A row of (number of blocks, value), mirrored about the middle block, or complete with all 25."""
    row = [value for count, value in runs for _ in range(count)]
    if len(row) <= _LAST:
        row += row[-2::-1]
    assert len(row) == _LAST + 1
    return lambda t: row[round(t * _LAST)]


def fake_hermite(t: float) -> float:
    """The cubic from 0 to 1 with slope 25/6 at both ends."""
    return t + 19 / 3 * t * (1 - t) * (0.5 - t)


def true_hermite(t: float) -> float:
    """The cubic from 1/24 to 1 with slope 25/6 at both ends; the first block alone has 0."""
    return (1 + 23 * t) / 24 + 77 / 12 * t * (1 - t) * (0.5 - t) if t else 0.0


def _smoothsteps() -> dict[str, Curve]:
    made: dict[str, Curve] = {"SMOOTHSTEP": smoothstep, "REVERSE-SMOOTHSTEP": reversed_(smoothstep)}
    for k in (2, 3, 4):
        forms: dict[str, Curve] = {
            f"SMOOTHSTEP*{k}": lambda t, k=k: fold(k * smoothstep(t)),  # type: ignore[misc]
            f"SMOOTHSTEP/{k}": lambda t, k=k: smoothstep(fold(k * t)),  # type: ignore[misc]
        }
        made |= forms | {f"R_{name}": reversed_(curve) for name, curve in forms.items()}
    return made


_valley: Curve = lambda t: abs(2 * t - 1)  # noqa: E731
_cosine: Curve = lambda t: (1 + math.cos(math.pi * t)) / 2  # noqa: E731

CURVES: dict[str, Curve] = {
    "RAMP_UP": lambda t: t,
    "RAMP_DOWN": lambda t: 1 - t,
    "VALLEY": _valley,
    "HILL": reversed_(_valley),
    "GRAD_V": _valley,
    "GRAD_A": reversed_(_valley),
    "FLAT_25": lambda t: 0.25,
    "FLAT_75": lambda t: 0.75,
    "ALL_A": lambda t: 0.0,
    "ALL_B": lambda t: 1.0,
    "WRAP08": steps((4, 1.0), (9, 0.0)),
    "WRAP12": steps((6, 1.0), (7, 0.0)),
    "WRAP14": steps((7, 1.0), (6, 0.0)),
    "WRAP16": steps((8, 1.0), (5, 0.0)),
    "MID12_50": steps((6, 0.0), (1, 0.25), (6, 0.5)),
    "OUT07": steps((18, 0.0), (7, 1.0)),
    "OUT12": steps((13, 0.0), (12, 1.0)),
    "OUT12_5": steps((12, 0.0), (1, 0.5), (12, 1.0)),
    "RING08_SOFT": steps((5, 0.0), (1, 0.5), (3, 1.0), (1, 0.5), (3, 0.0)),
    "RING08_5": steps((6, 0.0), (4, 1.0), (3, 0.0)),
    "RING10_5": steps((5, 0.0), (5, 1.0), (3, 0.0)),
    "RING10_3": steps((6, 0.0), (5, 1.0), (2, 0.0)),
    **_smoothsteps(),
    "COSINE": _cosine,
    "REVERSE_COSINE": reversed_(_cosine),
    "TRUE_CUBIC_HERMITE": true_hermite,
    "TRUE_REVERSE_CUBIC_HERMITE": reversed_(true_hermite),
    "FAKE_CUBIC_HERMITE": fake_hermite,
    "FAKE_REVERSE_CUBIC_HERMITE": reversed_(fake_hermite),
}
"""Presets by name; capitals do not matter, nor do `-`, `_` and spaces between words."""

_folded = {name.replace("-", "_").casefold(): name for name in CURVES}


def preset(name: str) -> Curve:
    """Return the curve of a preset.

    Raises:
        ParameterError: there is none of that name; a near one is suggested.
    """
    known = _folded.get("_".join(name.replace("-", " ").replace("_", " ").split()).casefold())
    if known is None:
        raise ParameterError(f"no preset is called {name!r}{suggestion(name, CURVES)}")
    return CURVES[known]


def through(points: Sequence[float]) -> Curve:
    """The line through some values, evenly spaced from the first block to the last.

    >>> line = through([0, 1, 0.5])
    >>> line(0), line(0.25), line(1)
    (0.0, 0.5, 0.5)
    """

    def at(t: float) -> float:
        place = t * (len(points) - 1)
        left = min(int(place), max(len(points) - 2, 0))
        share = place - left
        return float(points[left] + share * (points[left + 1] - points[left])) if share else float(points[left])

    return at


def sample(curve: Curve, count: int) -> list[float]:
    """The values for some number of blocks; one block alone lies in the middle.

    >>> sample(preset("grad v"), 5), sample(preset("GRAD_V"), 1)
    ([1.0, 0.5, 0.0, 0.5, 1.0], [0.0])
    """
    return [curve(i / (count - 1)) for i in range(count)] if count > 1 else [curve(0.5)] * count
