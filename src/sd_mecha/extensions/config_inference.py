"""Which known configs a state dict may belong to, by the names and shapes in its header."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from sd_mecha.extensions.config_types import ModelConfig
from sd_mecha.extensions.header import Header, Shape
from sd_mecha.storage.contract import TensorEntry

_logger = logging.getLogger("sd_mecha")
_REMEMBERED = 64

Entries = Mapping[str, TensorEntry | None]


class Fit(NamedTuple):
    """How badly a config fits a state dict; the least one, field by field, is the best.

    Attributes:
        unknown: share of the keys that the config does not know.
        wrong: share of the keys that have another shape there.
        missing: of the keys that the components with any key in the state dict need, the share that is not there.
    """

    unknown: float
    wrong: float
    missing: float

    def plus(self, other: Fit) -> Fit:
        """The sum over two state dicts."""
        return Fit(*(a + b for a, b in zip(self, other, strict=True)))


class ConfigIndex:
    """Scores state dicts against configs, of which it builds only those that a state dict may belong to.

    Args:
        configs: returns the configs to choose from; one with `signs` is only considered for state dicts that have a
            key which starts with one of them.
        version: returns a number that changes whenever `configs` would return others.
        derive: returns further configs for a header, such as one whose sizes are read off its shapes.
    """

    def __init__(
        self,
        configs: Callable[[], Iterable[ModelConfig]],
        version: Callable[[], int],
        derive: Callable[[Header], Iterable[ModelConfig]] = lambda header: (),
    ) -> None:
        self._configs = configs
        self._version = version
        self._derive = derive
        self._lock = threading.Lock()
        self._seen: int | None = None
        self._tables: dict[ModelConfig, _Table | None] = {}
        self._fits: OrderedDict[object, dict[ModelConfig, Fit]] = OrderedDict()

    def candidates(self, keys: Collection[str]) -> dict[ModelConfig, float]:
        """Return each config that knows a tenth or more of the keys, with the share that it does not know.

        Aliases count as the key that they stand for. No keys at all may belong to any config.
        """
        return {config: fit.unknown for config, fit in self.fits(keys).items()}

    def fits(self, entries: Entries | Collection[str], also: Iterable[ModelConfig] = ()) -> dict[ModelConfig, Fit]:
        """Return each config that knows a tenth or more of the keys, with how it fits.

        Args:
            entries: key -> shape and dtype where known, or the keys alone.
            also: configs to consider that nothing in the state dict may lead to, such as one of sizes that only the
                shapes of another state dict tell.
        """
        known: Entries = entries if isinstance(entries, Mapping) else dict.fromkeys(entries)
        configs = list(self._configs())  # this may load plugs, which changes the version
        if not known:
            return dict.fromkeys(configs, Fit(0.0, 0.0, 0.0))
        memo = frozenset(known.items())
        with self._lock:
            version = self._version()
            if version != self._seen:
                self._tables.clear()
                self._fits.clear()
                self._seen = version
            found = self._fits.get(memo)
            if found is not None:
                self._fits.move_to_end(memo)
        if found is None:
            found = self._score(known, configs)
            with self._lock:
                self._fits[memo] = found
                while len(self._fits) > _REMEMBERED:
                    self._fits.popitem(last=False)
        considered = set(map(id, configs))
        further = [config for config in also if config not in found and id(config) not in considered]
        return found | self._fitting(further, known)

    def _score(self, entries: Entries, configs: list[ModelConfig]) -> dict[ModelConfig, Fit]:
        header = Header(entries)
        starts = set(header)
        possible = [config for config in configs if _may_be(config, starts)]
        seen = {id(config) for config in possible}
        possible += [config for config in self._derive(header) if id(config) not in seen]
        return self._fitting(possible, entries)

    def _fitting(self, configs: Iterable[ModelConfig], entries: Entries) -> dict[ModelConfig, Fit]:
        fits = {}
        for config in configs:
            table = self._table(config)
            fit = None if table is None else table.fit(entries)
            if fit is not None:
                fits[config] = fit
        return fits

    def _table(self, config: ModelConfig) -> _Table | None:
        if config not in self._tables:
            try:
                self._tables[config] = _Table(config)
            except Exception:
                _logger.exception("model config %r cannot be read and is left out of inference", config.identifier)
                self._tables[config] = None
        return self._tables[config]


class _Table:
    """A config as inference reads it: name in a file -> component, shape, and whether it is needed."""

    def __init__(self, config: ModelConfig) -> None:
        self.names: dict[str, tuple[int, Shape | None, bool]] = {}
        self.needed: list[int] = []
        aliases: dict[str, tuple[int, Shape | None, bool]] = {}
        for number, component in enumerate(config.components().values()):
            keys = component.keys()
            self.needed.append(sum(not metadata.optional for metadata in keys.values()))
            for key, metadata in keys.items():
                self.names[key] = number, metadata.shape, not metadata.optional
                for alias in metadata.aliases:
                    aliases.setdefault(alias, self.names[key])
        self.names = aliases | self.names  # a key is never an alias of another one

    def fit(self, entries: Entries) -> Fit | None:
        """How the config fits; None where it knows less than a tenth."""
        known = wrong = 0
        found = [0] * len(self.needed)
        touched = set()
        for name, entry in entries.items():
            place = self.names.get(name)
            if place is None:
                continue
            component, shape, needed = place
            known += 1
            found[component] += needed
            touched.add(component)
            if entry is not None and shape is not None and entry.shape != shape:
                wrong += 1
        total = len(entries)
        if known * 10 < total:
            return None
        wanted = sum(self.needed[component] for component in touched)
        there = sum(found[component] for component in touched)
        return Fit(1 - known / total, wrong / total, 1 - min(there, wanted) / wanted if wanted else 0.0)


def _may_be(config: ModelConfig, starts: Iterable[str]) -> bool:
    signs: tuple[str, ...] = getattr(config, "signs", ())
    return not signs or any(start.startswith(signs) for start in starts)
