"""Arguments of a call while planning: constants as they are, tensors on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sd_mecha.errors import ContractError, RecipeTypeError
from sd_mecha.extensions.key_map import RealizedKeyRelation
from sd_mecha.extensions.merge_methods import MergeMethod, StateDict
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.extensions.tile import Tile
from sd_mecha.planning.keys import identity_relation
from sd_mecha.planning.program import Arg
from sd_mecha.planning.shapes import Spec, hollow, meta
from sd_mecha.storage.contract import TensorEntry

PLACEHOLDERS: Mapping[Any, Any] = {int: 1, float: 1.0, bool: False, str: ""}


class Values(StateDict[Any]):
    """A state dict parameter whose values are at hand."""

    def __init__(self, values: Mapping[str, Any], config: ModelConfig | None, method: str) -> None:
        self._values = values
        self._method = method
        if config is not None:
            self.model_config = config

    def __getitem__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            raise ContractError(
                f"{self._method} reads key {key!r}, which its key map does not name for this output; "
                f"it names {', '.join(map(repr, list(self._values)[:5])) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(slots=True)
class PlannedCall:
    """One call with everything that planning knows of its arguments."""

    method: MergeMethod
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg]
    specs: Sequence[Spec]
    constants: Mapping[int, Any]
    device: torch.device
    key: str
    relation: RealizedKeyRelation | None
    config: ModelConfig
    instance: Callable[..., Any] | None = None  # what to call, where that is kept from key to key

    @property
    def slots(self) -> list[int]:
        return [s for a in (*self.args, *self.kwargs.values()) for s in a.slots]

    @property
    def first_tensor(self) -> TensorEntry | None:
        entries = (self.specs[s] for s in self.slots)
        return next((e for e in entries if isinstance(e, TensorEntry)), None)

    @property
    def is_constant(self) -> bool:
        """Whether the result can be had now: it depends on shapes and constants only, or on constants only."""
        method = self.method
        if method.tiling == "shape":
            return all(self._is_known(a) for a in (*self.args, *self.kwargs.values()))
        pure = not (method.declaration.accepts_context or method.streamed or inspect.isclass(method.__wrapped__))
        return pure and bool(self.slots) and all(s in self.constants for s in self.slots)

    def _is_known(self, arg: Arg) -> bool:
        """Whether all of an argument that a method of shapes looks at is there: constants, and shapes of tensors."""
        return arg.convert is None and all(
            slot in self.constants or isinstance(self.specs[slot], TensorEntry) for slot in arg.slots
        )

    def run(self) -> Any:
        return self._call(lambda entry: hollow(entry, self.device))

    def on_meta(self) -> Any:
        """The result for tensors without values."""
        return self._call(meta)

    def on_sample(self) -> Any:
        """The result for one element of each tensor, from which the dtype of an elementwise result can be told."""
        return self._call(lambda entry: torch.ones(1, dtype=entry.dtype))

    def _call(self, make: Any) -> Any:
        method = self.method
        args = [self._value(a, make) for a in self.args]
        kwargs = {name: self._value(a, make) for name, a in self.kwargs.items()}
        if method.declaration.accepts_context:
            kwargs |= context(method, self.key, self.relation, self.config)
        return (self.instance or method.instantiate())(*args, **kwargs)

    def _value(self, arg: Arg, make: Any) -> Any:
        if arg.by_key is not None:
            values = {self.key if k is None else str(k): self._slot(s, arg.convert, make) for k, s in arg.by_key}
            return Values(values, arg.config, self.method.identifier)
        return self._slot(arg.slot, arg.convert, make)

    def _slot(self, slot: int, convert: type | torch.dtype | None, make: Any) -> Any:
        if slot in self.constants:
            return self.constants[slot]
        if isinstance(convert, torch.dtype):
            return make(TensorEntry((), convert))
        if convert is not None:
            return PLACEHOLDERS[convert]
        spec = self.specs[slot]
        return make(spec) if isinstance(spec, TensorEntry) else PLACEHOLDERS[spec]


def context(method: MergeMethod, key: str, relation: RealizedKeyRelation | None, config: ModelConfig) -> dict[str, Any]:
    """What a method finds in its `**kwargs` while planning; one that runs then alone also finds the node's config."""
    relation = relation or identity_relation(method, key)
    found = {"key": key, "key_relation": relation, "cache": None, "output_reused": False}
    if method.tiling in ("elementwise", "rows"):
        found["tile"] = Tile(0, 1, 1, (1,))
    if method.tiling == "shape":
        found["config"] = config
    return found


def convert_constant(value: Any, wanted: Any, merge_dtype: torch.dtype | None) -> Any:
    """A literal value as the type that a parameter declares.

    Raises:
        RecipeTypeError: it has no such meaning.
    """
    if value is None or isinstance(wanted, TypeVar):
        return value
    try:
        if wanted is torch.Tensor:
            return value if isinstance(value, torch.Tensor) else as_type(float(value), scalar_dtype(merge_dtype))
        if type(value) is wanted:
            return value
        if wanted is not str and not isinstance(value, str):
            return as_type(value, wanted)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RecipeTypeError(f"the value {value!r} cannot be used as {_name(wanted)}: {error}") from error
    raise RecipeTypeError(f"the {type(value).__name__} {value!r} cannot be used as {_name(wanted)}")


def as_type(value: Any, wanted: type | torch.dtype) -> Any:
    """A number, or a tensor of one element, as a Python number; or a number as a 0-d tensor of a dtype."""
    if isinstance(wanted, torch.dtype):
        return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=wanted)
    return wanted(value.item() if isinstance(value, torch.Tensor) else value)


def scalar_dtype(merge_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the tensor that a number becomes."""
    return merge_dtype if merge_dtype is not None and merge_dtype.is_floating_point else torch.float32


def _name(wanted: Any) -> str:
    return getattr(wanted, "__name__", str(wanted))
