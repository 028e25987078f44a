"""Families of model configs: one network in several sizes, and in the layouts that programs store it in.

A family says how its keys and shapes follow from a few hyper-parameters, and how those are read off a file. The sizes
that people know have names (`wan21_t2v_14b-original`); any other size is a config all the same, named by its
hyper-parameters (`wan.depth8_width256-original`), so that a recipe can name it and be read back.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Generic, TypeVar

import torch

from sd_mecha.extensions.config_lazy import LazyModelConfigBase
from sd_mecha.extensions.config_tables import ModelConfigImpl
from sd_mecha.extensions.config_types import InvalidConfigError, KeyMetadata, ModelConfig
from sd_mecha.extensions.header import Header, MissingShapeError, Shape
from sd_mecha.extensions.layouts import Link, Rule, inverse, links

H = TypeVar("H")

Keys = Mapping[str, Shape | KeyMetadata]
"""Key -> its shape, or all that is known of it."""

_FIELD = re.compile(r"([a-z]+)(\d{1,9})")


@dataclass(frozen=True)
class Layout(Generic[H]):
    """How one program stores the network.

    Args:
        build: hyper-parameters -> component -> keys.
        signs: patterns of keys (see `Header`), at least one of which every file of this layout has.
        read: the hyper-parameters of a file; raises LookupError where it is not of this family. Any key may be
            missing from the file.
        prefix: stands before every key of the network in the file; `build`, `signs` and `read` are without it.
        dtype: of keys that are given by a shape only.
        others: hyper-parameters -> component -> keys of what else such files may hold, named in full.
        foreign: patterns of keys that other networks have, and no file of this layout.
    """

    build: Callable[[H], Mapping[str, Keys]]
    signs: tuple[str, ...]
    read: Callable[[Header], H]
    prefix: str = ""
    dtype: torch.dtype = torch.bfloat16
    others: Callable[[H], Mapping[str, Keys]] = lambda hyper: {}
    foreign: tuple[str, ...] = ()

    def may_be_of(self, header: Header) -> bool:
        """Whether a file has a sign of this layout, and none of another."""
        signs, foreign = ([self.prefix + sign for sign in signs] for signs in (self.signs, self.foreign))
        return header.has(*signs) and not header.has(*foreign)


class Family(Generic[H]):
    """One network in several sizes and layouts.

    Args:
        name: of the family; lowercase letters and digits.
        hyper: a frozen dataclass of whole numbers, whose field names are lowercase letters only.
        variants: name -> hyper-parameters of the sizes that people know, the most common one first.
        layouts: name -> layout.
        rules: (layout, other layout) -> hyper-parameters -> the rules that make the second of the first. Both
            directions are conversions.
        absent: (variant, layout) that no config is made for, since another config stands for it.

    Raises:
        InvalidConfigError: a name or the dataclass is not of that form, or the rules name an unknown layout.
    """

    def __init__(
        self,
        name: str,
        hyper: type[H],
        variants: Mapping[str, H],
        layouts: Mapping[str, Layout[H]],
        rules: Mapping[tuple[str, str], Callable[[H], Iterable[Rule]]] | None = None,
        absent: Iterable[tuple[str, str]] = (),
    ) -> None:
        names = [field.name for field in fields(hyper)]  # type: ignore[arg-type]
        if not re.fullmatch(r"[a-z0-9]+", name) or not all(re.fullmatch(r"[a-z]+", n) for n in names):
            raise InvalidConfigError(
                f"config family {name!r} with hyper-parameters {', '.join(names)}: its name must be lowercase letters "
                "and digits, those of its hyper-parameters lowercase letters"
            )
        self.name = name
        self.hyper = hyper
        self.variants = dict(variants)
        self.layouts = dict(layouts)
        self.rules = dict(rules or {})
        if unknown := {layout for pair in self.rules for layout in pair} - self.layouts.keys():
            raise InvalidConfigError(f"config family {name!r} has rules for layouts {sorted(unknown)} that it lacks")
        self._absent = {(self.variants[variant], layout) for variant, layout in absent}
        self._lock = threading.Lock()
        self._configs: dict[tuple[H, str], FamilyConfig[H]] = {}

    def config(self, hyper: H, layout: str) -> FamilyConfig[H]:
        """The config of that size and layout: one object, however often it is asked for."""
        with self._lock:
            if (hyper, layout) not in self._configs:
                self._configs[hyper, layout] = FamilyConfig(self, hyper, layout)
            return self._configs[hyper, layout]

    def known(self) -> list[FamilyConfig[H]]:
        """The configs of the sizes that have names."""
        return self._present((hyper, layout) for hyper in self.variants.values() for layout in self.layouts)

    def _present(self, pairs: Iterable[tuple[H, str]]) -> list[FamilyConfig[H]]:
        return [self.config(*pair) for pair in pairs if pair not in self._absent]

    def variant(self, hyper: H) -> str:
        """The first part of the identifier of a size."""
        named = next((name for name, known in self.variants.items() if known == hyper), None)
        if named is not None:
            return named
        code = "_".join(f"{field}{value:d}" for field, value in asdict(hyper).items())  # type: ignore[call-overload]
        return f"{self.name}.{code}"

    def resolve(self, identifier: str) -> FamilyConfig[H] | None:
        """The config of that identifier, None where it is not of this family."""
        variant, _, layout = identifier.rpartition("-")
        if layout not in self.layouts:
            return None
        if variant in self.variants:
            return next(iter(self._present([(self.variants[variant], layout)])), None)
        name, _, code = variant.partition(".")
        parts = {found[1]: found[2] for part in code.split("_") if (found := _FIELD.fullmatch(part))}
        if name != self.name or set(parts) != {field.name for field in fields(self.hyper)}:  # type: ignore[arg-type]
            return None
        made = self.hyper(**{field: int(value) for field, value in parts.items()})
        config = self.config(made, layout)
        return config if config.identifier == identifier else None

    def infer(self, header: Header) -> list[FamilyConfig[H]]:
        """The configs that a file may have: that of its own size, or the known ones of its layout.

        The known ones count where the size cannot be read, since keys are missing or no shapes are known.
        """
        found: list[FamilyConfig[H]] = []
        for name, layout in self.layouts.items():
            if not layout.may_be_of(header):
                continue
            try:
                found += self._present([(layout.read(header.below(layout.prefix)), name)])
            except MissingShapeError:
                known = self._present((hyper, name) for hyper in self.variants.values())
                if all(entry is None for entry in header.entries.values()):
                    # names alone tell nothing of sizes: a config outside of the family stands for all that share them
                    taken = [self.config(*pair).keys().keys() for pair in self._absent if pair[1] == name]
                    known = [config for config in known if config.keys().keys() not in taken]
                found += [config for config in known if header.agrees(config.shape)]
            except (LookupError, ZeroDivisionError):
                continue  # of another family
        return found

    def links(self, hyper: H, source: str, target: str) -> dict[str, Link] | None:
        """What each key of one layout is made of in another; None where no rule says."""
        if (source, target) in self.rules:
            return self._forward(hyper, source, target)
        if (target, source) in self.rules:
            return inverse(self._forward(hyper, target, source), self._shapes(hyper, target))
        return None

    def neighbours(self, config: FamilyConfig[H]) -> list[FamilyConfig[H]]:
        """The configs that one conversion leads to from a config."""
        pairs = [(a, b) for a, b in self.rules if config.layout in (a, b)]
        return self._present((config.hyper, b if a == config.layout else a) for a, b in pairs)

    def _forward(self, hyper: H, source: str, target: str) -> dict[str, Link]:
        there = self.config(hyper, target).keys()
        made = links(self.rules[source, target](hyper), self._shapes(hyper, source))
        return {key: link for key, link in made.items() if key in there}

    def _shapes(self, hyper: H, layout: str) -> dict[str, Shape]:
        keys = self.config(hyper, layout).keys()
        return {key: metadata.shape for key, metadata in keys.items() if metadata.shape is not None}


class FamilyConfig(LazyModelConfigBase, Generic[H]):
    """A config of one size and layout, built when its keys are first asked for."""

    def __init__(self, family: Family[H], hyper: H, layout: str) -> None:
        super().__init__()
        self.family = family
        self.hyper = hyper
        self.layout = layout
        self._identifier = f"{family.variant(hyper)}-{layout}"

    @property
    def identifier(self) -> str:
        return self._identifier

    def create_config(self) -> ModelConfig:
        layout = self.family.layouts[self.layout]
        parts = {n: _component(k, layout.prefix, layout.dtype) for n, k in layout.build(self.hyper).items()}
        for name, keys in layout.others(self.hyper).items():
            parts[name] = parts.get(name, {}) | _component(keys, "", layout.dtype)
        return ModelConfigImpl(self._identifier, parts)

    def shape(self, key: str) -> Shape | None:
        """The shape of a key, None if it is unknown."""
        known = self.keys().get(key)
        return None if known is None else known.shape


def _component(keys: Keys, prefix: str, dtype: torch.dtype) -> dict[str, KeyMetadata]:
    return {
        prefix + key: known if isinstance(known, KeyMetadata) else KeyMetadata(known, dtype)
        for key, known in keys.items()
    }


def translated(
    build: Callable[[H], Mapping[str, Keys]], rules: Callable[[H], Sequence[Rule]]
) -> Callable[[H], Mapping[str, Keys]]:
    """A `build` for the layout that rules make of another one, component by component.

    Args:
        build: that of the first layout.
        rules: from the first layout to this one.
    """

    def built(hyper: H) -> Mapping[str, Keys]:
        made = list(rules(hyper))
        out: dict[str, Keys] = {}
        for component, keys in build(hyper).items():
            shapes = {k: s.shape if isinstance(s, KeyMetadata) else s for k, s in keys.items()}
            there = {k: link.shape for k, link in links(made, {k: s or () for k, s in shapes.items()}).items()}
            out |= {component: there} if there else {}
        return out

    return built
