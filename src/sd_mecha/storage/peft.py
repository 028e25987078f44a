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
_MAX_WORK = 1_000_000_000  # steps, of some 4 ns, to match expressions with the names of modules
_EXPRESSION, _MATCH = 100_000, 100  # steps to compile an expression, and to begin to match it
_COUNT = 1000  # steps to count how far a repeat may go in a name
_PLAIN = re.compile(r"\^?[\w.-]+")
_RANKED = re.compile(r"(.+)\.(?:lora_A|lora_embedding_A|hada_w1_b|lokr_w1_b|lokr_w2_b)(?:\.weight|\.\w+)?")
_WHOLE = re.compile(r"(.+)\.lokr_w1(?:\.\w+)?")
_WRAPPER = "base_model.model."
_ENDLESS = re.compile(r"\)[*+?{]|\(\?(?!<?[=!]|:)")  # groups that repeat, and those with rules of their own
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?<?[:=!]|(?:[*+?]|\{\d*,?\d*\})[?+]?|.", re.DOTALL)
_REPEAT = re.compile(r"[*+?]|\{\d*,?\d*\}")

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
    ranks: dict[str, int] = {}
    for key, entry in entries.items():
        found = _RANKED.fullmatch(key)
        if found is not None and entry.shape:
            ranks.setdefault(found[1], entry.shape[0])
    own = _own_alphas(settings.get("alpha_pattern") or {}, [name.removeprefix(_WRAPPER) for name in ranks], source)
    for module, rank in ranks.items():
        alpha = own.get(module.removeprefix(_WRAPPER), usual)
        # The product is scaled by alpha / sqrt(rank) instead of alpha / rank.
        yield f"{module}.alpha", alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    whole = {found[1] for key in entries if (found := _WHOLE.fullmatch(key))} - ranks.keys()
    if whole and usual != settings.get("r"):
        _logger.warning(
            "%s: %d modules such as %r are products of whole matrices, which count as they are: their factor of "
            "alpha / r is left out; give it as alpha= to apply_adapter",
            source,
            len(whole),
            min(whole),
        )


def _own_alphas(patterns: Any, names: list[str], source: str) -> dict[str, float]:
    """What `alpha_pattern` says: names of modules, or of their ends, or expressions for these; the first counts."""
    if type(patterns) is not dict:
        _fail(source, "alpha_pattern", patterns, "an object of names and numbers")
    plain: dict[str, tuple[int, float]] = {}
    expressions: list[tuple[re.Pattern[str], tuple[int, float]]] = []
    effort = _Effort(names)
    for place, (pattern, value) in enumerate(patterns.items()):
        found = place, _number(value, "alpha_pattern", source)
        if len(pattern) <= _MAX_PATTERN and _PLAIN.fullmatch(pattern):
            plain[pattern] = found
            continue
        if len(pattern) <= _MAX_PATTERN and not _ENDLESS.search(pattern):
            expression = effort.compile(pattern)
            if expression is not None:
                expressions.append((expression, found))
                continue
        _fail(source, "alpha_pattern", pattern, "the end of a module's name, or a simple expression for it")
    own = {}
    for name in names:
        end = name[-_MAX_PATTERN - 1 :]
        ends = [f"^{name}", name, *(end[at + 1 :] for at, letter in enumerate(end) if letter == ".")]
        hits = [plain[end] for end in ends if end in plain]
        hits += [found for expression, found in expressions if expression.match(name)]
        if hits:
            own[name] = min(hits)[1]
    return own


class _Effort:
    """What it takes, at most, to match expressions with names: those that might take too long are not compiled."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._length = max(map(len, names), default=0)
        self._steps = 0
        self._stops: dict[tuple[str, str], int] = {}

    def compile(self, pattern: str) -> re.Pattern[str] | None:
        """None for what is no expression, or takes too long."""
        if not self._take(_EXPRESSION):
            return None
        try:
            expression = re.compile(rf"(?:.*\.)?(?:{pattern})$")
            ways = 1 + self._ways(rf".*\.(?:{pattern})" if "|" in pattern else rf".*\.{pattern}")
        except re.error:
            return None
        step = 1 + (len(pattern) + self._length) // 16
        return expression if self._take(len(self._names) * (_MATCH + ways * step)) else None

    def _take(self, steps: int) -> bool:
        self._steps += steps
        return self._steps <= _MAX_WORK

    def _ways(self, pattern: str) -> int:
        """In how many ways, at most, an expression without repeated groups may be tried before it fails."""
        ways, options = 1, [1]
        literal = repeat = ""  # what follows a piece
        for piece in reversed(_PIECE.findall(pattern)):
            if _REPEAT.match(piece):
                repeat = piece
            elif repeat:
                ways *= min(self._most_stops(piece, literal), 2 if repeat[0] == "?" else _MAX_WORK)
                literal = repeat = ""
            elif piece.isalnum() or piece in "_-" or (piece[0] == "\\" and not piece[1].isalnum()):
                literal = piece[-1] + literal
            else:
                literal = ""
                if piece == ")":
                    options.append(1)
                elif piece == "|":
                    options[-1] += 1
                elif piece[0] == "(":
                    ways *= options.pop()
        return ways * options[0]

    def _most_stops(self, piece: str, literal: str) -> int:
        """How often, in any one name, the literal text can follow a repeated piece that began at one place."""
        found = self._stops.get((piece, literal))
        if found is None:
            if not self._take(_COUNT * len(self._names)):
                return _MAX_WORK
            run, stop = re.compile(f"(?:{piece})+"), re.compile(f"(?={re.escape(literal)})")
            ends = (
                len(stop.findall(name, span.start(), span.end() + len(literal)))
                for name in self._names
                for span in run.finditer(name)
            )
            found = self._stops[piece, literal] = max(ends, default=0) + 1
        return found


def _number(value: Any, name: str, source: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    _fail(source, name, value, "a number")


def _fail(source: str, name: str, got: Any, expected: str) -> NoReturn:
    raise FileFormatError(f"{source}: {name}: got {brief(got)}, expected {expected}")
