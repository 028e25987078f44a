"""Which known configs a set of key names may belong to."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from sd_mecha.extensions.config_types import ModelConfig

_logger = logging.getLogger("sd_mecha")


class ConfigIndex:
    """Name of a key -> the configs that know it, so that a state dict is scored in one pass over its keys.

    Args:
        configs: returns the configs to choose from.
        version: returns a number that changes whenever `configs` would return others.
    """

    def __init__(self, configs: Callable[[], Iterable[ModelConfig]], version: Callable[[], int]) -> None:
        self._configs = configs
        self._version = version
        self._lock = threading.Lock()
        self._seen: int | None = None
        self._indexed: list[ModelConfig] = []
        self._owners: dict[str, tuple[ModelConfig, ...]] = {}

    def candidates(self, keys: Collection[str]) -> dict[ModelConfig, float]:
        """Return each config that knows a tenth or more of the keys, with the share that it does not know.

        Aliases count as the key that they stand for. No keys at all may belong to any config.
        """
        owners = self._current()
        if not keys:
            return dict.fromkeys(self._indexed, 0.0)
        hits: Counter[ModelConfig] = Counter()
        for group, count in Counter(map(owners.get, keys)).items():
            for config in group or ():
                hits[config] += count
        total = len(keys)
        return {config: 1 - hits[config] / total for config in self._indexed if hits[config] * 10 >= total}

    def _current(self) -> dict[str, tuple[ModelConfig, ...]]:
        if self._seen == self._version():
            return self._owners
        with self._lock:
            configs = list(self._configs())  # this may load plugs, which changes the version
            version = self._version()
            if version != self._seen:
                self._build(configs)
                self._seen = version
            return self._owners

    def _build(self, configs: list[ModelConfig]) -> None:
        known = len(self._indexed)
        if configs[:known] == self._indexed:
            owners, added = dict(self._owners), configs[known:]
        else:
            owners, added, known = {}, configs, 0
        indexed = configs[:known]
        shared: dict[tuple[ModelConfig, ...], tuple[ModelConfig, ...]] = {}
        for config in added:
            try:
                names = {*config.keys(), *(alias for m in config.keys().values() for alias in m.aliases)}
            except Exception:
                _logger.exception("model config %r cannot be read and is left out of inference", config.identifier)
                continue
            for name in names:
                group = (*owners.get(name, ()), config)
                owners[name] = shared.setdefault(group, group)
            indexed.append(config)
        self._owners, self._indexed = owners, indexed
