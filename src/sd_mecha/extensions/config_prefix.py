"""Names that a program put before all keys of a known network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from sd_mecha.extensions import model_configs
from sd_mecha.storage.contract import TensorEntry

_COMMON = ("model.diffusion_model.", "model.model.", "diffusion_model.", "transformer.", "unet.", "net.", "model.")
"""What wrappers of networks are called in files; the longest ones first."""

_WORST = 0.5
"""Of the keys below a prefix, at most this share may be unknown to the config that they are taken for."""


def foreign_prefix(entries: Mapping[str, TensorEntry | None]) -> str:
    """The prefix without which the keys are those of a known config; empty if they are so as they stand, or never.

    Args:
        entries: key -> shape and dtype.

    Keys that do not have the prefix, such as averages or a second network, do not speak against it as long as half of
    all keys have it.
    """
    if not entries or model_configs.fits(entries):
        return ""
    best = ""
    most = 0
    for prefix in _possible(entries):
        below = {key[len(prefix) :]: entry for key, entry in entries.items() if key.startswith(prefix)}
        fits = model_configs.fits(below)
        unknown = min((fit.unknown for fit in fits.values()), default=1.0)
        known = round(len(below) * (1 - unknown))
        if unknown < _WORST and known > most:  # a checkpoint rather than the network within it
            best, most = prefix, known
    return best


def _possible(entries: Mapping[str, TensorEntry | None]) -> Iterator[str]:
    """Beginnings that at least half of the keys share, whole words between dots."""
    counts: Counter[str] = Counter()
    for key in entries:
        parts = key.split(".")
        for length in range(1, min(len(parts), 4)):
            if parts[length - 1].isdecimal():
                break
            counts[".".join(parts[:length]) + "."] += 1
    half = len(entries) / 2
    shared = [prefix for prefix, count in counts.items() if count >= half]
    yield from dict.fromkeys([*(p for p in _COMMON if p in shared), *shared])
