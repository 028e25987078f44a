"""Arguments to try a merge method with: random tensors, and defaults or examples elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sd_mecha.extensions.key_map import RealizedKeyRelation, realize
from sd_mecha.extensions.merge_methods import MergeMethod, ParameterData
from sd_mecha.extensions.model_configs import KeyMetadata, ModelConfig, StructuralModelConfig
from sd_mecha.storage.dtypes import is_integral
from sd_mecha.testing.calls import DirectCall, Inputs

KEY = "tensor"
MODELS = 3  # how many inputs a parameter that takes any number of them is given
CALLS = 3  # how many relations of a key map are tried
LARGEST = 1 << 16  # elements of the largest tensor that is made because a config asks for it
MISSING: Any = object()


@dataclass
class Trial:
    """What a method is tried on: tensors of that shape and dtype, and given values for other parameters."""

    method: MergeMethod
    shape: tuple[int, ...]
    dtype: torch.dtype
    example: Mapping[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._plain = StructuralModelConfig({KEY: KeyMetadata(self.shape, self.dtype)})
        parameters = self.method.declaration.signature.parameters
        if unknown := self.example.keys() - parameters.keys():
            known = ", ".join(parameters)
            raise ValueError(f"{self.method.identifier} has no parameter {min(unknown)!r}; it has {known}")
        self._given = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        self._given.update(self.example)

    def calls(self) -> Iterator[DirectCall]:
        """One call, or one for each of the first few relations of the method's key map or config.

        Raises:
            ValueError: a parameter that is not a tensor has neither a default nor a value in the example.
        """
        configs = {name: data.model_config or self._plain for name, data in self.method.declaration}
        made = 0
        for relation in self._relations(configs):
            if made < CALLS and self._elements(relation, configs) <= LARGEST:
                made += 1
                yield self._call(relation, configs)

    def tensor(self, metadata: KeyMetadata | None = None) -> Tensor:
        """A random tensor: normally distributed; small integers for integer dtypes, coin flips for bool."""
        shape = self.shape if metadata is None or metadata.shape is None else metadata.shape
        if is_integral(self.dtype):
            limit = 2 if self.dtype == torch.bool else 100
            return torch.randint(limit, shape, generator=self._generator).to(self.dtype)
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def _relations(self, configs: Mapping[str, ModelConfig]) -> Iterator[RealizedKeyRelation]:
        output = self.method.declaration.result.model_config
        if self.method.map_keys is None:
            known = next((config for config in configs.values() if config is not self._plain), self._plain)
            for key in known.keys():  # noqa: SIM118 (a config is no mapping)
                yield RealizedKeyRelation((key,), dict.fromkeys(configs, (key,)))
            return
        key_map = self.method.build_key_map(configs, output or self._plain)
        assert key_map is not None
        for relation in key_map.relations:
            realized = realize(relation, lambda _parameter, _key: True)
            if realized is not None:
                yield realized

    def _elements(self, relation: RealizedKeyRelation, configs: Mapping[str, ModelConfig]) -> int:
        """How large the largest input tensor of a relation is."""
        largest = 0
        for name, keys in relation.inputs.items():
            known = configs[name].keys()
            for key in keys:
                if key in known and (shape := known[key].shape) is not None:
                    largest = max(largest, math.prod(shape))
        return largest

    def _call(self, relation: RealizedKeyRelation, configs: Mapping[str, ModelConfig]) -> DirectCall:
        declaration = self.method.declaration

        def argument(name: str, data: ParameterData, given: Any) -> Any:
            config = configs[name]
            if data.is_state_dict:
                keys = relation.inputs.get(name, ())
                values = {key: self._value(name, data, given, config.keys().get(key)) for key in keys}
                return Inputs(values, config)
            return self._value(name, data, given, config.keys().get(relation.outputs[0]))

        def named(names: Any, parameters: Any) -> Iterator[tuple[str, Any]]:
            for name, data in zip(names, parameters, strict=True):
                yield name, argument(name, data, self._given.get(name, MISSING))

        positional = named(declaration.names.args, declaration.parameters.args)
        args = [value for _, value in positional]
        if declaration.names.has_varargs():
            name, data = declaration.names.vararg, declaration.parameters.vararg
            args += [argument(name, data, given) for given in self._given.get(name, [MISSING] * MODELS)]
        kwargs = dict(named(declaration.parameters.kwargs, declaration.parameters.kwargs.values()))
        return DirectCall(self.method, args, kwargs, relation)

    def _value(self, name: str, data: ParameterData, given: Any, metadata: KeyMetadata | None) -> Any:
        takes_tensor = data.value_type is Tensor or isinstance(data.value_type, TypeVar)
        if given is MISSING:
            if takes_tensor:
                return self.tensor(metadata)
            raise ValueError(
                f"{self.method.identifier}: parameter {name!r}, a {data.value_type.__name__} has no default; "
                f"give values to try, for example examples=[{{{name!r}: ...}}]"
            )
        if given is None or not takes_tensor:
            return given
        if isinstance(given, Tensor):
            return given
        return torch.tensor(given, dtype=self.dtype if self.dtype.is_floating_point else torch.float32)
