"""Kinds of adapters: what a small file stores of the change of each weight, and how the change follows from it.

The keys of an adapter file are names of modules with endings: `lora_unet_conv_in.lora_up.weight` is the part `up` of a
module. A kind says by which endings its parts go in the styles that programs write, which parts make a module one of
that kind, and how they make a delta. `read_modules` takes a file apart by the registered kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sd_mecha.errors import AdapterError
from sd_mecha.extensions.registry import Registry

Shape = tuple[int, ...]

COMMON = "common"
"""The style of endings that every program writes alike."""

ANY_NAME = "*"
"""In an ending: any one name between dots, such as that of an adapter in `lora_A.default.weight`."""


class Delta(Protocol):
    """How the parts of a module make the change of a weight."""

    def __call__(self, parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
        """Return the change.

        It may run on torch's meta device, so it must not look at values.

        Args:
            parts: by name, in the dtype of the merge.
            shape: shape of the weight in a usual model; the sizes may follow the parts where a model differs.
            base: the weight itself, where the kind needs it for these parts.
        """


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """A change that is the product of two matrices, so that some of its rows are cheap to make and to add.

    Attributes:
        left: (rows, rank).
        right: (rank, elements of a row).
        scale: factor of the product.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0


class ProductOf(Protocol):
    """How the parts of a module are the factors of a product."""

    def __call__(self, parts: Mapping[str, Tensor]) -> Product:
        """Return the factors; it may look at values.

        Args:
            parts: as for `Delta`, those of a change that can be made in rows.
        """


@dataclass(frozen=True, eq=False)
class AdapterKind:
    """An algorithm.

    Args:
        name: of the algorithm, as `lora`.
        spellings: style -> ending of a key, behind the dot -> part. An ending may begin with `_` instead, and then
            follows the module's name directly; `*` stands for any name. A part may have several endings in a style,
            the usual one first.
        needs: alternatives of parts, of which a module of this kind has one, the preferred one first.
        delta: makes the change.
        may: parts that such a module may have besides.
        base_for: the change can only be told from the weight itself where one of these parts is there.
        parameter: what of the module is changed, `weight` or `bias`.
        rows: part -> the axis along which it is cut to make some rows of the delta only; empty where that cannot be.
        whole_for: that cannot be where one of these parts is there; nor where the weight itself is needed.
        product: makes the factors of which the change is the product, where it is one that can be made in rows.
        not_product: parts with which it is none.
        optional: whether nothing is amiss where the model has no such parameter.
    """

    name: str
    spellings: Mapping[str, Mapping[str, str]]
    needs: tuple[frozenset[str], ...]
    delta: Delta
    may: frozenset[str] = frozenset()
    base_for: frozenset[str] = frozenset()
    parameter: str = "weight"
    rows: Mapping[str, int] = field(default_factory=dict)
    whole_for: frozenset[str] = frozenset()
    product: ProductOf | None = None
    not_product: frozenset[str] = frozenset()
    optional: bool = False

    def used(self, parts: Iterable[str]) -> frozenset[str] | None:
        """Which of a module's parts are read; None where they do not make it one of this kind."""
        there = frozenset(parts)
        needed = next((needs for needs in self.needs if needs <= there), None)
        return None if needed is None else needed | (self.may & there)

    def needs_base(self, parts: Iterable[str]) -> bool:
        """Whether the weight itself is needed."""
        return not self.base_for.isdisjoint(parts)

    def in_rows(self, parts: Iterable[str]) -> bool:
        """Whether some rows of the delta can be made without the others."""
        there = frozenset(parts)
        return bool(self.rows) and self.whole_for.isdisjoint(there) and not self.needs_base(there)

    def cut(self, parts: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """The parts of which the delta is these rows."""
        cut = {part: parts[part].narrow(axis, start, stop - start) for part, axis in self.rows.items() if part in parts}
        return {**parts, **cut}

    def factors(self, parts: Mapping[str, Tensor]) -> Product | None:
        """The factors of the change; None where it is no product of two."""
        is_product = self.product is not None and self.not_product.isdisjoint(parts)
        return self.product(parts) if is_product and self.product is not None else None

    def ending(self, part: str, style: str) -> str:
        """The usual ending of a part in a style, or in that which all share.

        Raises:
            AdapterError: the style has no ending for it.
        """
        for name in (style, COMMON):
            for ending, known in self.spellings.get(name, {}).items():
                if known == part and ANY_NAME not in ending:
                    return ending
        raise AdapterError(f"adapters of kind {self.name} have no name for {part!r} in the style {style!r}")


@dataclass(frozen=True)
class AdapterModule:
    """The parts of one module of a file.

    Attributes:
        name: of the module, as in the file.
        parts: part -> its key.
        styles: part -> the style of its ending.
        kinds: what the parts are, one kind for each parameter of the module.
    """

    name: str
    parts: Mapping[str, str]
    styles: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[AdapterKind, ...] = ()

    def used(self, kind: AdapterKind) -> dict[str, str]:
        """Part -> key of what one of its kinds reads, in the order of the file."""
        used = kind.used(self.parts) or frozenset()
        return {part: key for part, key in self.parts.items() if part in used}


_kinds: Registry[AdapterKind] = Registry("adapter kind")
_endings: tuple[int, re.Pattern[str], list[tuple[str, str]]] | None = None


def register_adapter(kind: AdapterKind) -> AdapterKind:
    """Add a kind of adapters; the kind itself is returned.

    Raises:
        DuplicateNameError: there is one of that name.
    """
    _kinds.register(kind.name, kind)
    return kind


def resolve(name: str) -> AdapterKind:
    """The kind of that name; UnknownNameError (a KeyError) suggests the nearest one."""
    return _kinds.resolve(name)


def remove(name: str) -> AdapterKind:
    """Take a kind out and return it; UnknownNameError where there is none."""
    return _kinds.remove(name)


def get_all() -> list[AdapterKind]:
    """Every registered kind."""
    return _kinds.get_all()


def kinds_version() -> int:
    """A number that is another one after kinds were added or taken out."""
    return _kinds.version


def read_modules(keys: Iterable[str]) -> tuple[list[AdapterModule], list[str]]:
    """Take the keys of an adapter file apart.

    Returns:
        The modules, each with its kinds, and the keys that belong to no kind.

    Raises:
        AdapterError: half of a pair is missing, a module is of two kinds at once, a part is there twice, or the file
            mixes styles of names for one kind.
    """
    parts: dict[str, dict[str, str]] = {}
    styles: dict[str, dict[str, str]] = {}
    stray: list[str] = []
    for key in keys:
        found = _parse(key)
        if found is None:
            stray.append(key)
            continue
        module, style, part = found
        known = parts.setdefault(module, {})
        if part in known:
            raise AdapterError(
                f"adapter module {module!r} has its {part!r} twice, as {known[part]!r} and as {key!r}; "
                "the file mixes styles of names: leave one of them out"
            )
        known[part] = key
        styles.setdefault(module, {})[part] = style
    modules = []
    known_kinds = get_all()
    for name, named in parts.items():
        kinds, unread = _kinds_of(name, named, known_kinds)
        stray += [named[part] for part in named if part in unread]
        if kinds:
            modules.append(AdapterModule(name, named, styles[name], kinds))
    _check_styles(modules)
    return modules, stray


def looks_like_adapter(keys: Iterable[str]) -> bool:
    """Whether most keys of a file are parts of adapters."""
    names = list(keys)
    try:
        _, stray = read_modules(names)
    except AdapterError:
        return True  # it has parts of adapters, if not all of them
    return 2 * len(stray) < len(names)


def _parse(key: str) -> tuple[str, str, str] | None:
    """Module, style and part of a key, by the longest ending that fits."""
    global _endings
    if _endings is None or _endings[0] != _kinds.version:
        kinds = get_all()  # this may load plugs, which changes the version
        _endings = _kinds.version, *_compiled(kinds)
    _, pattern, meanings = _endings
    found = pattern.fullmatch(key)
    if found is None:
        return None
    assert found.lastgroup is not None
    style, part = meanings[int(found.lastgroup[1:])]
    return found["module"], style, part


def _compiled(kinds: Iterable[AdapterKind]) -> tuple[re.Pattern[str], list[tuple[str, str]]]:
    endings = {
        ending: (style, part)
        for kind in kinds
        for style, named in kind.spellings.items()
        for ending, part in named.items()
    }
    written: dict[str, list[str]] = {".": [], "_": []}  # by their first character, which few places in a key have
    for number, ending in enumerate(endings):
        text = re.escape(ending.removeprefix("_")).replace(re.escape(ANY_NAME), r"[^.]+")
        written["_" if ending.startswith("_") else "."].append(f"(?P<e{number}>{text})")
    ways = [f"{re.escape(sign)}(?:{'|'.join(texts)})" for sign, texts in written.items() if texts]
    # the shortest name of a module leaves the longest ending
    return re.compile(f"(?P<module>.+?)(?:{'|'.join(ways)})"), list(endings.values())


def _kinds_of(
    name: str, parts: Mapping[str, str], known: Iterable[AdapterKind]
) -> tuple[tuple[AdapterKind, ...], set[str]]:
    """The kinds of a module, and the parts that none of them reads."""
    found: dict[str, AdapterKind] = {}
    unread = set(parts)
    for kind in known:
        used = kind.used(parts)
        if used is None:
            continue
        if kind.parameter in found:
            raise AdapterError(
                f"adapter module {name!r} is of two kinds at once, {found[kind.parameter].name} and {kind.name}: "
                f"it has {', '.join(map(repr, parts.values()))}"
            )
        found[kind.parameter] = kind
        unread -= used
    if unread - _UNCERTAIN:
        for kind in known:
            if kind not in found.values():
                _check_halves(kind, name, parts, unread)
    return tuple(found.values()), unread


_UNCERTAIN = frozenset({"alpha", "plain_weight"})
"""Parts that alone do not tell a kind: any file may hold them."""


def _check_halves(kind: AdapterKind, name: str, parts: Mapping[str, str], unread: set[str]) -> None:
    begun = [needs & unread for needs in kind.needs]
    most = max(range(len(begun)), key=lambda i: len(begun[i]))
    if not begun[most] - _UNCERTAIN:
        return
    lacking = " and no ".join(map(repr, sorted(kind.needs[most] - parts.keys())))
    there = ", ".join(repr(parts[part]) for part in parts if part in begun[most])
    raise AdapterError(
        f"adapter module {name!r} is half of a {kind.name}: it has {there} but no {lacking}; "
        "the file is damaged or was not saved whole"
    )


def _check_styles(modules: Iterable[AdapterModule]) -> None:
    first: dict[AdapterKind, tuple[str, str]] = {}
    for module in modules:
        for kind in module.kinds:
            needed = frozenset().union(*kind.needs)
            for part, key in module.used(kind).items():
                style = module.styles[part]
                if style == COMMON or part not in needed:
                    continue
                seen, example = first.setdefault(kind, (style, key))
                if seen != style:
                    raise AdapterError(
                        f"the adapter file mixes styles of names: {example!r} is of style {seen}, {key!r} of style "
                        f"{style}; use one file for each, or rename the keys of one"
                    )
