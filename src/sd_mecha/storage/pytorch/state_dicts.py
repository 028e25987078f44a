"""Which part of a checkpoint is the model.

Trainers wrap what `module.state_dict()` gives in dicts of their own, beside optimiser states, averages and numbers.
Of a dict, the first of these is taken whose value is a dict with tensors in it, and looked into the same way:

    state_dict, model_state_dict, model, module, params_ema, params, generator, net, weights, ema, model_ema

Where there is none of them, the dict's own tensors are the model. So a Lightning checkpoint gives its `state_dict`
and not its optimiser's states; an average of the weights is taken where it is what others load by default
(`params_ema` beside `params`), or where there is nothing else. Names within the dict that is taken stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.strict_json import brief

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params_ema",
    "params",
    "generator",
    "net",
    "weights",
    "ema",
    "model_ema",
)
"""Keys of wrappers, in the order in which they are tried."""

_logger = logging.getLogger("sd_mecha")


def pick_state_dict(loaded: Any, is_tensor: Callable[[Any], bool], source: str) -> dict[str, Any]:
    """The tensors of the model in what a checkpoint holds.

    Args:
        loaded: what the file holds.
        is_tensor: tells tensors from other values.
        source: what messages call the file.

    Raises:
        FileFormatError: there are none, or they have no names.
    """
    if type(loaded) is not dict:
        what = "a single tensor" if is_tensor(loaded) else brief(loaded)
        raise FileFormatError(f"{source}: holds {what}; expected a dict of tensors, such as module.state_dict()")
    picked = _look_into(loaded, is_tensor, set())
    if picked is None:
        keys = ", ".join(brief(key) for key in list(loaded)[:20]) + (", ..." if len(loaded) > 20 else "")
        raise FileFormatError(
            f"{source}: holds no dict of tensors where one was looked for: neither directly nor under "
            f"{', '.join(WRAPPERS)}; its keys are: {keys or '(none)'}"
        )
    trail, found = picked
    if trail:
        _logger.info("%s: the model is taken from %s", source, " -> ".join(map(repr, trail)))
    tensors = {}
    for key, value in found.items():
        if not is_tensor(value):
            _logger.debug("%s: %s is no tensor and is left out", source, brief(key))
        elif type(key) is not str:
            raise FileFormatError(f"{source}: a tensor has the key {brief(key)}; expected text")
        else:
            tensors[key] = value
    return tensors


def _look_into(
    loaded: dict[Any, Any], is_tensor: Callable[[Any], bool], seen: set[int]
) -> tuple[tuple[str, ...], dict[Any, Any]] | None:
    """The dict of tensors that is the model, and the wrappers that lead to it."""
    seen.add(id(loaded))
    for name in WRAPPERS if len(seen) < 100 else ():
        inner = loaded.get(name)
        if type(inner) is dict and id(inner) not in seen:
            found = _look_into(inner, is_tensor, seen)
            if found is not None:
                return (name, *found[0]), found[1]
    return ((), loaded) if any(map(is_tensor, loaded.values())) else None
