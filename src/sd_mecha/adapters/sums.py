"""The sum of what several adapters make of one module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_mecha.adapters.exact import exact_factors
from sd_mecha.adapters.factors import low_rank, product_norm, truncated
from sd_mecha.adapters.places import Place, Places, dense
from sd_mecha.adapters.ranks import RankRule
from sd_mecha.adapters.result import Adapter
from sd_mecha.adapters.sources import AdapterSource
from sd_mecha.errors import AdapterError, MechaError, ShapeError
from sd_mecha.extensions.adapters import AdapterKind, AdapterModule

_STORED = ("full", "norm", "full_bias", "norm_bias", "lora_bias")
"""Kinds that are added as they are."""

_SHOWN = 3


@dataclass(frozen=True)
class Member:
    """A module of an adapter, and its place in the result."""

    source: AdapterSource
    weight: float
    module: AdapterModule
    kind: AdapterKind
    place: Place


@dataclass
class Total:
    """What the members of one module make together.

    Attributes:
        ups, downs: factors, which stand side by side.
        kernel: dimensions behind the first two, as far as any member shows them.
        stored: a change that is stored whole.
    """

    ups: list[Tensor] = field(default_factory=list)
    downs: list[Tensor] = field(default_factory=list)
    kernel: tuple[int, ...] = ()
    stored: Tensor | None = None

    def add(self, change: Tensor) -> None:
        """Add a change that is stored whole."""
        self.stored = change if self.stored is None else self.stored + change


def members(sources: Iterable[tuple[AdapterSource, float]], places: Places) -> dict[tuple[str, str], list[Member]]:
    """Group the modules of adapters: (module of the result, parameter) -> what makes it.

    Raises:
        AdapterError: a module has no place in the result, or depends on the weight that it changes.
    """
    found: dict[tuple[str, str], list[Member]] = {}
    for source, weight in sources:
        strays = []
        for module in source.modules:
            for kind in module.kinds:
                if kind.needs_base(module.used(kind)):
                    raise AdapterError(
                        f"{source.name}: module {module.name!r} is of kind {kind.name} and depends on the weight that "
                        "it changes; merge it into a model and extract the difference with extract_adapter"
                    )
                there = places.of(module.name, kind.parameter)
                strays += [] if there else [module.name]
                for place in there:
                    made = found.setdefault((place.module, kind.parameter), [])
                    made.append(Member(source, weight, module, kind, place))
        if strays:
            shown = ", ".join(map(repr, strays[:_SHOWN]))
            raise AdapterError(
                f"{source.name}: {len(strays)} of {len(source.modules)} modules have no place in the result, such as "
                f"{shown}; is it for another architecture, or the style without a name for that part?"
            )
    return found


def total(module: str, parts: Iterable[Member]) -> Total:
    """Add up what makes a module.

    Raises:
        ShapeError: the parts differ in shape.
        AdapterError: one is of a kind that cannot be added.
    """
    found = Total()
    shapes: dict[tuple[int, ...], str] = {}
    for member in parts:
        read = member.source.parts(member.module, member.kind)
        try:
            shape = _add(found, member, read)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, MechaError):
                raise
            listed = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in read.items())
            raise AdapterError(
                f"{member.source.name}: the parts of module {member.module.name!r} do not fit each other as a "
                f"{member.kind.name}: {listed}"
            ) from error
        shapes.setdefault(shape, member.source.name)
    if len(shapes) > 1:
        listed = " and ".join(f"{shape} in {name}" for shape, name in shapes.items())
        raise ShapeError(f"module {module!r} differs in shape: {listed}; adapters for one architecture can be added")
    return found


def write_module(made: Adapter, module: str, parameter: str, sum_: Total, rule: RankRule | None) -> None:
    """Put the sum of a module into an adapter: as factors, or whole where a part of it is and no rank is asked for.

    Raises:
        AdapterError: it is a whole change, and the style has no name for one.
    """
    kernel = math.prod(sum_.kernel) > 1
    if sum_.stored is not None:
        change = sum_.stored
        for up, down in zip(sum_.ups, sum_.downs, strict=True):
            change = change + (up @ down).reshape(change.shape)
        if rule is None or change.dim() < 2:
            _store(made, module, parameter, change)
            return
        up, down = low_rank(change.flatten(1), rule, kernel, randomized=False)
        made.measure(module, change.flatten(1), made.add_lora(module, up, down, tuple(change.shape[2:])))
        return
    up, down = torch.cat(sum_.ups, 1), torch.cat(sum_.downs)
    narrow = (up, down) if rule is None else truncated(up, down, rule, kernel)
    stored = made.add_factors(module, *narrow, sum_.kernel)
    missed = product_norm(torch.cat([up, -stored[0]], 1), torch.cat([down, stored[1]]))
    made.note(module, missed, product_norm(up, down))


def _add(found: Total, member: Member, read: dict[str, Tensor]) -> tuple[int, ...]:
    """Add a part; the shape of its change is returned, a kernel flattened into the columns."""
    if member.kind.name in _STORED:
        stored = next(read[part] for part in ("diff", "diff_b", "w_norm", "b_norm", "up_bias") if part in read)
        change = dense(member.place, member.kind.delta(read, tuple(stored.shape), None)) * member.weight
        found.add(change)
        found.kernel = found.kernel or tuple(change.shape[2:])
        return tuple(change.flatten(1).shape) if change.dim() > 1 else tuple(change.shape)
    factors = exact_factors(member.kind.name, read)
    if factors is None:
        raise AdapterError(
            f"{member.source.name}: module {member.module.name!r} is of kind {member.kind.name}, which has no factors "
            "that could be added; merge it into a model and extract the difference with extract_adapter"
        )
    shown = tuple(factors[1].shape[2:]) if member.place.kernel is None else member.place.kernel
    found.kernel = found.kernel or shown
    up, down = member.place.factors(factors[0] * member.weight, factors[1].flatten(1))
    found.ups.append(up)
    found.downs.append(down)
    if up.shape[1] != down.shape[0]:
        raise ValueError
    return up.shape[0], down.shape[1]


def _store(made: Adapter, module: str, parameter: str, change: Tensor) -> None:
    if made.endings != "kohya":
        raise AdapterError(
            f"module {module!r} has a change that is stored whole, which this style has no name for; "
            "choose style='kohya' or 'comfyui', or a rank"
        )
    made.put(f"{module}.{'diff_b' if parameter == 'bias' else 'diff'}", change)
