"""Which weights of a model the names in adapter files mean.

Programs write a module's name with dots or with `_` between its parts, below a prefix for the network or the text
encoder that it belongs to, as it is called in the layout that they train in. All of that is undone here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from sd_mecha.extensions.adapter_links import layouts_of
from sd_mecha.extensions.layouts import Link
from sd_mecha.extensions.model_configs import ModelConfig

NETWORK, ENCODERS = "network", ("encoder 1", "encoder 2", "encoder 3")

WRAPPERS: dict[str, str | None] = {
    "base_model.model": None,
    "model": None,
    "lora": None,
    "lycoris": None,
    "oft": None,
    "model.diffusion_model": NETWORK,
    "diffusion_model": NETWORK,
    "diffuser": NETWORK,
    "unet": NETWORK,
    "transformer": NETWORK,
    "dit": NETWORK,
    "net": NETWORK,
    "te": ENCODERS[0],
    "te1": ENCODERS[0],
    "te2": ENCODERS[1],
    "te3": ENCODERS[2],
    "text_encoder": ENCODERS[0],
    "text_encoder_2": ENCODERS[1],
    "text_encoder_3": ENCODERS[2],
    "text_encoders.clip_l": "clip_l",
    "text_encoders.clip_g": "clip_g",
    "text_encoders.t5xxl": "t5xxl",
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5xxl": "t5xxl",
}
"""What may stand before the name of a module, and the part of the model that it leads to; None: any."""

_NO_ENCODERS = frozenset({"diffuser", "vae", "ema", "scheduler", "keys"})
_ENCODERS = {ENCODERS[0]: ("clip_l",), ENCODERS[1]: ("clip_g", "t5xxl"), ENCODERS[2]: ("t5xxl",)}
_PARAMETERS = {"weight": ("weight", "", "scale"), "bias": ("bias",)}
"""What a parameter is called behind the name of its module; some are keys without a module of their own."""

_SHARE = 0.9
_REMEMBERED = 16


class AdapterNames:
    """Looks up modules of adapters in one model config."""

    def __init__(self, config: ModelConfig) -> None:
        self._tables: dict[str, dict[str, Link]] = {name: {} for name in config.components()}
        self._whole = config.identifier == "structural"
        self._wrappers = {flat(name) + "_": role for name, role in WRAPPERS.items()}
        for layout, links in layouts_of(config):
            for name, component in layout.components().items():
                table = self._tables.setdefault(name, {})
                keys = [key for key in component.keys() if key in links]  # noqa: SIM118 (it is no mapping)
                prefix = _prefix(keys)
                for key in keys:
                    for tail in _tails(key, prefix):
                        table.setdefault(flat(tail), links[key])

    def find(self, module: str, parameter: str) -> Link | None:
        """What a parameter of a module is made of in the model; None where it has no such module.

        Args:
            module: its name in an adapter file.
            parameter: `weight` or `bias`.
        """
        for name, role in self._readings(flat(module.replace(".processor.", "."))):
            for component in self._components(role):
                for ending in _PARAMETERS[parameter]:
                    link = self._tables[component].get(f"{name}_{ending}" if ending else name)
                    if link is not None:
                        return link
        return None

    def _readings(self, name: str) -> Iterator[tuple[str, str | None]]:
        """Yield the name without more and more of what may stand before it, with the part of the model it leads to."""
        queue: list[tuple[str, str | None]] = [(name, None)]
        for here, role in queue:
            yield here, role
            if here.endswith("_to_out"):  # attention processors of diffusers lack the number of the layer
                yield f"{here}_0", role
            for wrapper, leads_to in self._wrappers.items():
                if here.startswith(wrapper):
                    reading = here[len(wrapper) :], role or leads_to
                    if reading not in queue:
                        queue.append(reading)

    def _components(self, role: str | None) -> Iterable[str]:
        """The components that a name may be of, in the order in which they are looked at."""
        if role is None or self._whole:
            return self._tables
        if role == NETWORK:
            return [name for name in self._tables if name == "diffuser"] or self._tables
        encoders = [name for name in self._tables if name not in _NO_ENCODERS]
        if role not in _ENCODERS:
            return [name for name in encoders if name == role]
        usual = [name for name in _ENCODERS[role] if name in encoders]
        return usual or (encoders if role == ENCODERS[0] else [])


_known: dict[int, tuple[ModelConfig, AdapterNames]] = {}
_lock = threading.Lock()


def names_of(config: ModelConfig) -> AdapterNames:
    """The names of a config; those of configs that were asked for lately are kept."""
    with _lock:
        found = _known.pop(id(config), None) or (config, AdapterNames(config))
        _known[id(config)] = found  # the last one is the one used last
        while len(_known) > _REMEMBERED:
            _known.pop(next(iter(_known)))
        return found[1]


def flat(name: str) -> str:
    """A name with `_` for each dot, as kohya-ss and LyCORIS write it."""
    return name.replace(".", "_")


def _prefix(keys: list[str]) -> str:
    """What nearly all keys of a component begin with, up to where numbered layers or their modules begin."""
    prefix = ""
    while keys:
        following = Counter(key[len(prefix) :].partition(".") for key in keys if key.startswith(prefix))
        heads: Counter[str] = Counter()
        for (head, dot, _), count in following.items():
            heads[head] += count if dot else 0
        head, count = heads.most_common(1)[0]
        below = [tail for (name, _, tail), _ in following.items() if name == head]
        if count < _SHARE * len(keys) or any(tail.partition(".")[0].isdecimal() for tail in below):
            break
        prefix += head + "."
    return prefix


def _tails(key: str, prefix: str) -> Iterator[str]:
    """Yield a key in full, and without the first parts of the prefix of its component."""
    yield key
    if not key.startswith(prefix):
        return
    for place, sign in enumerate(prefix):
        if sign == ".":
            yield key[place + 1 :]
