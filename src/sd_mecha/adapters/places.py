"""Which module of the result a module of an adapter belongs to, row by row.

Files that name modules of different layouts can be added up because every layout says what its tensors are made of in
the model's own: two modules that change the same rows there belong together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sd_mecha.adapters.styles import Style
from sd_mecha.extensions.adapter_links import layouts_of, own_links
from sd_mecha.extensions.adapter_names import names_of
from sd_mecha.extensions.layouts import Link
from sd_mecha.extensions.model_configs import ModelConfig


@dataclass(frozen=True)
class Place:
    """Rows of a module of an adapter, and where they go.

    Attributes:
        module: name of the module of the result.
        spans: (first row in the source, first row in the result, how many); empty: all rows, as they are.
        rows: how many rows the module of the result has; 0 where there are no spans.
        turned: whether the source's matrix is transposed to become rows of the model.
        turns: whether the rows of the model are transposed to become the result's.
        kernel: dimensions of the result's weight behind the first two; None where they are not known.
    """

    module: str
    spans: tuple[tuple[int, int, int], ...] = ()
    rows: int = 0
    turned: bool = False
    turns: bool = False
    kernel: tuple[int, ...] | None = None

    def factors(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the result's module, whose other rows do not change."""
        if self.turned:
            up, down = down.mT, up.mT
        up = self.rows_of(up)
        return (down.mT, up.mT) if self.turns else (up, down)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The rows where they go, others being 0."""
        if not self.spans or (self.spans == ((0, 0, tensor.shape[0]),) and self.rows == tensor.shape[0]):
            return tensor
        placed = tensor.new_zeros(self.rows, *tensor.shape[1:])
        for source, target, count in self.spans:
            placed[target : target + count] = tensor[source : source + count]
        return placed


class Places(Protocol):
    """Finds where modules go."""

    def of(self, module: str, parameter: str) -> list[Place]:
        """The places of a parameter of a module; none where it has no place."""


class SameNames:
    """Every module keeps its name, whatever the model is."""

    def of(self, module: str, parameter: str) -> list[Place]:
        return [Place(module)]


class PlacesInModel:
    """Modules go where a style names the same rows of a model.

    Args:
        config: that of the model.
        style: whose names the result has.
    """

    def __init__(self, config: ModelConfig, style: Style) -> None:
        self._names = names_of(config)
        self._targets: dict[str, list[tuple[Link, str | None]]] = {}
        target = style.layout(config)
        links = {layout.identifier: found for layout, found in layouts_of(config)}
        sources = [(target, links[target.identifier], set(target.components()))]
        if target is not config:
            sources.append((config, own_links(config), set(config.components()) - set(target.components())))
        for layout, known, components in sources:
            for name in components:
                for key in layout.components()[name].keys():  # noqa: SIM118 (it is no mapping)
                    if key in known:
                        module = style.module(layout, name, key.removesuffix(".weight").removesuffix(".bias"))
                        for part_key in {part.key for part in known[key].parts}:
                            self._targets.setdefault(part_key, []).append((known[key], module))

    def of(self, module: str, parameter: str) -> list[Place]:
        source = self._names.find(module, parameter)
        if source is None:
            return []
        candidates = {link.key: (link, name) for part in source.parts for link, name in self._targets.get(part.key, ())}
        found = []
        for link, name in candidates.values():
            spans = tuple(_overlaps(source, link))
            if spans and name is not None:
                rows = sum(part.stop - part.start for part in link.parts)
                found.append(Place(name, spans, rows, source.turned, link.turned, link.shape[2:]))
        return found


def _overlaps(source: Link, target: Link) -> Iterator[tuple[int, int, int]]:
    """Yield the rows that two links have in common, as each counts them."""
    here = 0
    for one in source.parts:
        there = 0
        for other in target.parts:
            start, stop = max(one.start, other.start), min(one.stop, other.stop)
            if one.key == other.key and start < stop:
                yield here + start - one.start, there + start - other.start, stop - start
            there += other.stop - other.start
        here += one.stop - one.start


def dense(place: Place, change: Tensor) -> Tensor:
    """A whole change of a module of the source as one of the result's module."""
    if place.turned:
        change = change.mT
    change = place.rows_of(change)
    return change.mT if place.turns else change
