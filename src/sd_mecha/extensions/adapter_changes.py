"""What an adapter file changes in a model: for each key the modules that have a part in it."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from sd_mecha.errors import AdapterError, MechaError, ShapeError
from sd_mecha.extensions import translations
from sd_mecha.extensions.adapter_names import names_of
from sd_mecha.extensions.adapters import AdapterKind, AdapterModule, Shape, get_all, kinds_version, read_modules
from sd_mecha.extensions.layouts import Link, Part
from sd_mecha.extensions.model_configs import ModelConfig

SHOWN = 3
REMEMBERED = 2  # answers of `find_changes`


@dataclass(frozen=True)
class Change:
    """What one module does to one parameter.

    Attributes:
        module: the module.
        kind: how its parts make a delta.
        parts: part -> key in the adapter file.
        link: what the parameter is made of in the model.
    """

    module: AdapterModule
    kind: AdapterKind
    parts: Mapping[str, str]
    link: Link

    @property
    def base_keys(self) -> tuple[str, ...]:
        """The keys of the model that are needed to tell the delta."""
        return tuple(dict.fromkeys(p.key for p in self.link.parts)) if self.kind.needs_base(self.parts) else ()

    @property
    def in_rows(self) -> bool:
        """Whether some rows of the delta can be made without the others."""
        return not self.link.turned and bool(self.link.shape) and self.kind.in_rows(self.parts)

    def delta(self, adapter: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
        """The change of the parameter, its rows as the link counts them.

        Raises:
            AdapterError: the parts do not fit each other or the model.
        """
        try:
            weight = translations.apply(self.link, base) if self.base_keys else None
            made = self.kind.delta(self.tensors(adapter), self.link.shape, weight)
        except MechaError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{key!r} {tuple(adapter[key].shape)}" for key in self.parts.values())
            raise AdapterError(
                f"adapter module {self.module.name!r} does not fit as a {self.kind.name}: {shapes}, for a weight of "
                f"shape {self.link.shape} ({_line(error)})"
            ) from error
        return made.mT if self.link.turned else made

    def tensors(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts by name."""
        return {part: adapter[key] for part, key in self.parts.items()}


@dataclass(frozen=True)
class Changes:
    """What a file changes.

    Attributes:
        by_key: key of the model -> the changes that have a part in it.
        strays: names of modules, and keys, that mean nothing in the model.
        modules: number of modules in the file.
    """

    by_key: Mapping[str, tuple[Change, ...]]
    strays: tuple[str, ...]
    modules: int

    def left_out(self, name: str, config: str, available: Callable[[str], bool]) -> list[str]:
        """What to say of modules that change nothing; one text, or none.

        Args:
            name: what to call the adapter file.
            config: what to call the model.
            available: whether the model has a key.
        """
        lost = {
            change.module.name: None
            for key, changes in self.by_key.items()
            for change in changes
            if not change.kind.optional and not all(map(available, (key, *change.base_keys)))
        }
        said = []
        where = "the model" if config == "structural" else f"a model of {config}"
        for names, why in (
            (self.strays, f"have no place in {where}"),
            (list(lost), "change weights that the model lacks"),
        ):
            if names:
                said.append(f"{len(names)} modules or keys {why}, such as {_some(names)}")
        return [f"adapter {name}: {'; '.join(said)}; they are left out"] if said else []


def find_changes(keys: Iterable[str], config: ModelConfig, name: str = "the adapter") -> Changes:
    """Read the keys of an adapter file, and find what they change in models of a config.

    Files of one trainer have the same keys, and so one answer, which is found and kept once for all of them.

    Args:
        keys: the keys of the file.
        config: that of the model.
        name: what to call the file in messages.

    Raises:
        AdapterError: the file is not well formed, none of it fits the model, or two modules change the same rows.
    """
    memo = tuple(keys), id(config), kinds_version()
    with _lock:
        found = _lately.pop(memo, None) or (config, _find_changes(memo[0], config, name))
        _lately[memo] = found  # the last one is the one used last
        while len(_lately) > REMEMBERED:
            _lately.pop(next(iter(_lately)))
        return found[1]


_lately: dict[tuple[tuple[str, ...], int, int], tuple[ModelConfig, Changes]] = {}
"""The config is kept with the answer, so that no other one gets its id."""
_lock = threading.RLock()  # building a config may ask again


def _find_changes(keys: Iterable[str], config: ModelConfig, name: str) -> Changes:
    try:
        modules, stray = read_modules(keys)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from error
    names = names_of(config)
    by_key: dict[str, list[Change]] = {}
    strays = list(stray)
    for module in modules:
        for kind in module.kinds:
            link = names.find(module.name, kind.parameter)
            if link is None and kind.optional:
                continue
            if link is None:
                strays.append(module.name if kind.parameter == "weight" else f"{module.name} ({kind.parameter})")
                continue
            change = Change(module, kind, module.used(kind), link)
            for key in dict.fromkeys(part.key for part in link.parts):
                by_key.setdefault(key, []).append(change)
    if not modules:
        raise AdapterError(
            f"{name} is no adapter file: none of its {len(strays)} keys is part of a known kind, such as "
            f"{_some(strays) or 'none at all'}; known kinds: {_kinds()}"
        )
    if not by_key:
        where = "the model" if config.identifier == "structural" else f"a model of {config.identifier}"
        raise AdapterError(
            f"{name} is an adapter for another architecture: none of its {len(modules)} modules has a place in "
            f"{where}, such as {_some([module.name for module in modules])}"
        )
    for key, changes in by_key.items():
        _check_disjoint(name, key, changes)
    return Changes({key: tuple(found) for key, found in by_key.items()}, tuple(strays), len(modules))


def assemble(
    key: str, changes: Iterable[Change], shape: Shape, adapter: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> Tensor:
    """The change of one key of the model.

    Args:
        key: the key.
        changes: those that have a part in it.
        shape: shape of the key.
        adapter, base: the tensors that the changes name.

    Raises:
        AdapterError: parts do not fit each other.
        ShapeError: they do not fit the rows of the model that they are for.
    """
    whole: Tensor | None = None
    for change in changes:
        delta = change.delta(adapter, base)
        for part, place in parts_in(key, change):
            if change.link.parts == (part,) and (not shape or part.stop - part.start == shape[0]):
                # sizes may differ from those of the config, as where a model has more input channels
                return delta.reshape(shape) if delta.numel() == math.prod(shape) else delta
            if whole is None:
                whole = delta.new_zeros(shape)
            wanted = whole[part.start : part.stop]
            rows = delta[place : place + part.stop - part.start]
            if rows.numel() != wanted.numel() or delta.shape[0] != change.link.shape[0]:
                raise ShapeError(
                    f"adapter module {change.module.name!r} makes a delta of shape {tuple(delta.shape)} for "
                    f"{change.link.shape}: rows {part.start} to {part.stop} of {key!r}, of shape {tuple(wanted.shape)}"
                )
            if not whole.is_meta:  # there torch would load its compiler for it
                wanted += rows.reshape(wanted.shape)
    assert whole is not None  # every change has a part in the key
    return whole


def parts_in(key: str, change: Change) -> Iterator[tuple[Part, int]]:
    """Yield each part of a change that lies in a key, and the row of the delta where it begins."""
    place = 0
    for part in change.link.parts:
        if part.key == key:
            yield part, place
        place += part.stop - part.start


def _check_disjoint(name: str, key: str, changes: list[Change]) -> None:
    if len(changes) == 1:
        return
    spans = sorted(
        (part.start, part.stop, change.module.name) for change in changes for part, _ in parts_in(key, change)
    )
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end or start == end == 0:
            raise AdapterError(
                f"{name}: modules {first!r} and {second!r} both change {key!r}; the file mixes styles of names: "
                "leave one of them out"
            )


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(map(repr, shown[:SHOWN])) + (", ..." if len(shown) > SHOWN else "")


def _kinds() -> str:
    return ", ".join(kind.name for kind in get_all())


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
