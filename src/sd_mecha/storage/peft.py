"""Adapters of PEFT: factors in one file, and what scales them in another beside it, `adapter_config.json`.

Other programs keep an `alpha` with the factors of each module. So does a reader here: it shows that file's `lora_alpha`
as an `alpha` of each module.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import ByteSource, Reader, TensorEntry, check_range, flat_bytes
from sd_mecha.storage.locations import Location
from sd_mecha.storage.strict_json import brief, parse_object
from sd_mecha.storage.views import ReaderView

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")

_MAX_CONFIG = 10_000_000
_MAX_PATTERN = 200
_RANKED = re.compile(r"(.+)\.(?:lora_A|lora_embedding_A|hada_w1_b|lokr_w1_b|lokr_w2_b)(?:\.weight|\.\w+)?")
_WHOLE = re.compile(r"(.+)\.lokr_w1(?:\.\w+)?")
_WRAPPER = "base_model.model."
_REPEATED_GROUP = re.compile(r"\)[*+?{]")

_logger = logging.getLogger("sd_mecha")


def find_adapter(location: Location) -> tuple[Location, Location] | None:
    """The factors and the configuration of an adapter of PEFT; None if that is not what lies there.

    Args:
        location: the folder of an adapter, or its file of factors.
    """
    if location.is_folder():
        folder = location
        weights = next((file for name in FILES if (file := folder.child(name)).is_file()), None)
    elif location.basename in FILES:
        folder, weights = location.parent(), location
    else:
        return None
    if weights is None or not folder.child(CONFIG).is_file():
        return None
    return weights, folder.child(CONFIG)


class PeftReader(ReaderView):
    """The factors of an adapter with an `alpha` for each module that has a rank.

    Args:
        reader: the factors.
        config: the file of the configuration.

    Raises:
        FileFormatError: the configuration breaks a rule, or says that factors mean something that is not read here.
    """

    def __init__(self, reader: Reader, config: Location) -> None:
        super().__init__(reader)
        self._config = config.open()
        try:
            self._show(_settings(self._config), config.name)
        except BaseException:
            self.close()
            raise

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} {self._config.fingerprint}"

    def check_unchanged(self) -> None:
        super().check_unchanged()
        self._config.check_unchanged()

    def close(self) -> None:
        super().close()
        self._config.close()

    def _show(self, settings: Mapping[str, Any], source: str) -> None:
        if settings.get("fan_in_fan_out"):
            raise FileFormatError(
                f"{source}: fan_in_fan_out is set: the adapter is for weights that lie the other way round, "
                "which is not read here; merge it with PEFT first"
            )
        self._alphas = {
            name: struct.pack("=f", alpha)
            for name, alpha in _alphas(settings, self._reader.entries, source)
            if name not in self._reader.entries
        }
        self.entries: Mapping[str, TensorEntry] = {
            **self._reader.entries,
            **dict.fromkeys(self._alphas, TensorEntry((), torch.float32)),
        }

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        if name not in self._alphas:
            return self._reader.read_into(name, start, buffer)
        target = flat_bytes(buffer)
        check_range(name, start, len(target), 4)
        target[:] = self._alphas[name][start : start + len(target)]
        return None


def _settings(config: ByteSource) -> dict[str, Any]:
    if config.size > _MAX_CONFIG:
        raise FileFormatError(f"{config.name}: has {config.size} bytes; expected at most {_MAX_CONFIG}")
    return parse_object(config.read(0, config.size), config.name)


def _alphas(
    settings: Mapping[str, Any], entries: Mapping[str, TensorEntry], source: str
) -> Iterator[tuple[str, float]]:
    """Name and value of the `alpha` of each module."""
    usual = settings.get("lora_alpha", settings.get("alpha"))
    if usual is None:
        return
    usual = _number(usual, "lora_alpha", source)
    patterns = settings.get("alpha_pattern") or {}
    if type(patterns) is not dict:
        _fail(source, "alpha_pattern", patterns, "an object of names and numbers")
    own = [(_pattern(name, source), _number(value, "alpha_pattern", source)) for name, value in patterns.items()]
    ranked: set[str] = set()
    for key, entry in entries.items():
        found = _RANKED.fullmatch(key)
        if found is None or not entry.shape or found[1] in ranked:
            continue
        ranked.add(found[1])
        name = found[1].removeprefix(_WRAPPER)
        alpha = next((value for pattern, value in own if pattern.match(name)), usual)
        # The product is scaled by alpha / sqrt(rank) instead of alpha / rank.
        yield f"{found[1]}.alpha", alpha * math.sqrt(entry.shape[0]) if settings.get("use_rslora") else alpha
    whole = {found[1] for key in entries if (found := _WHOLE.fullmatch(key))} - ranked
    if whole and usual != settings.get("r"):
        _logger.warning(
            "%s: %d modules such as %r are products of whole matrices, which count as they are: their factor of "
            "alpha / r is left out; give it as alpha= to apply_adapter",
            source,
            len(whole),
            min(whole),
        )


def _pattern(name: str, source: str) -> re.Pattern[str]:
    """A name or expression for the end of the names of modules, as PEFT reads it."""
    # Groups that repeat can take for ever to fail, and nobody needs them here.
    if len(name) <= _MAX_PATTERN and not _REPEATED_GROUP.search(name):
        try:
            return re.compile(rf"(?:.*\.)?(?:{name})$")
        except re.error:
            pass
    _fail(source, "alpha_pattern", name, "the end of a module's name, or a plain expression for it")


def _number(value: Any, name: str, source: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    _fail(source, name, value, "a number")


def _fail(source: str, name: str, got: Any, expected: str) -> NoReturn:
    raise FileFormatError(f"{source}: {name}: got {brief(got)}, expected {expected}")
