"""A merge method as an object: what it declares, calling it to build a node, and what the engine calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType, NoneType
from typing import Any, Literal, cast

from sd_mecha.errors import RecipeTypeError
from sd_mecha.extensions.key_map import KeyMap, build_key_map
from sd_mecha.extensions.merge_spaces import MergeSpaceSymbol
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.extensions.parameters import FunctionArgs, Interface, ParameterData, type_name
from sd_mecha.extensions.values import RecipeNodeOrValue, value_to_node
from sd_mecha.recipes.nodes import MergeRecipeNode, RecipeNode

Tiling = Literal["whole", "elementwise", "rows", "pieces", "select", "shape"]


class CandidateDispatchError(RecipeTypeError):
    """An implementation of an interface does not fit the arguments."""

    def __init__(self, candidate_identifier: str, message: str) -> None:
        self.candidate_identifier = candidate_identifier
        super().__init__(f"{candidate_identifier}: {message}")


class MergeMethodInterface:
    """The implementations behind an interface method, in order of registration."""

    def __init__(self, identifier: str) -> None:
        self.identifier = identifier
        self.candidates: list[tuple[MergeMethod, inspect.Signature]] = []

    def register_implementation(self, candidate: MergeMethod) -> None:
        self.candidates.append((candidate, candidate.signature))


class MergeMethod:
    """A registered function (or class with `__call__`) and everything planning needs to know of it."""

    def __init__(
        self,
        fn_or_cls: Callable[..., Any],
        identifier: str,
        declaration: Interface,
        *,
        tiling: Tiling = "whole",
        reuse_outputs: bool = True,
        cache_factory: Callable[[], Any] = NoneType,
        default_factories: Mapping[str, Callable[[], RecipeNodeOrValue]] = MappingProxyType({}),
        is_conversion: bool = False,
        interface: MergeMethodInterface | None = None,
    ) -> None:
        self.__wrapped__ = fn_or_cls
        self.__doc__ = fn_or_cls.__doc__
        self.__name__ = getattr(fn_or_cls, "__name__", identifier)
        self.__module__ = fn_or_cls.__module__
        self.identifier = identifier
        self.declaration = declaration
        self.signature = declaration.signature
        self.tiling: Tiling = tiling
        self.reuse_outputs = reuse_outputs
        self.cache_factory = cache_factory
        self.default_factories = default_factories
        self.is_conversion = is_conversion
        self.interface = interface
        call = fn_or_cls.__call__ if inspect.isclass(fn_or_cls) else fn_or_cls
        self.streamed = inspect.isgeneratorfunction(call)
        self.map_keys: Callable[[Any], None] | None = getattr(fn_or_cls, "map_keys", None)
        self.in_pieces: Callable[[Any], bool] | None = getattr(fn_or_cls, "in_pieces", None)
        self.sum_of: tuple[str, str, str] | None = None
        """Parameters x, y and c where the result is `x + c * y` for every finite number c but 0."""
        self._default_nodes: dict[str, RecipeNode] = {}
        self._merge_spaces = self._each(lambda data: data.merge_space)
        self._configs = self._each(lambda data: data.model_config)
        named = [declaration.result, *(data for _, data in declaration)]
        self.declares_configs = interface is not None or any(data.model_config is not None for data in named)

    def __repr__(self) -> str:
        return f"<merge method {self.identifier!r}>"

    # --- calling builds a node -------------------------------------------------------------------------------------

    def __call__(self, *args: RecipeNodeOrValue, **kwargs: RecipeNodeOrValue) -> MergeRecipeNode:
        """Bind the arguments to a recipe node; Python values are wrapped as `value_to_node` says.

        Raises:
            RecipeTypeError: arguments are missing, unknown, or of a type that the parameter cannot take.
        """
        d = self.declaration
        names = d.names.args
        if len(args) > len(names) and not d.names.has_varargs():
            raise self._binding_error(args, kwargs)
        bound = [self._wrap(name, data, a) for name, data, a in zip(names, d.parameters.args, args, strict=False)]
        bound += [self._wrap(f"*{d.names.vararg}", d.parameters.vararg, a) for a in args[len(names) :]]
        for name, data in zip(names[len(args) :], d.parameters.args[len(args) :], strict=True):
            bound.append(self._keyword(name, data, kwargs, args))
        keyword = {name: self._keyword(name, data, kwargs, args) for name, data in d.parameters.kwargs.items()}
        if not kwargs.keys() <= (keyword.keys() | set(names[len(args) :])):
            raise self._binding_error(args, kwargs)
        return MergeRecipeNode.of(self, tuple(bound), keyword)

    def create_recipe(self, bound_args: inspect.BoundArguments) -> MergeRecipeNode:
        """The node for arguments that are already bound to `get_signature()`."""
        return self(*bound_args.args, **bound_args.kwargs)

    def _keyword(self, name: str, data: ParameterData, kwargs: Mapping[str, Any], args: Any) -> RecipeNode:
        if name in kwargs:
            return self._wrap(name, data, kwargs[name])
        if name in self.default_factories:
            return self._wrap(name, data, None)
        node = self._default_nodes.get(name)
        if node is None:
            default = self.signature.parameters[name].default
            if default is inspect.Parameter.empty:
                raise self._binding_error(args, kwargs)
            node = self._default_nodes[name] = value_to_node(default)
        return node

    def _wrap(self, name: str, data: ParameterData, value: Any) -> RecipeNode:
        if isinstance(value, RecipeNode):
            return value
        if value is None and name in self.default_factories:
            value = self.default_factories[name]()
        if value is None and not self.takes_none(name):
            raise RecipeTypeError(f"{self.identifier}: {name} is None; expected a {type_name(data.value_type)}")
        try:
            return value_to_node(value, data.interface)
        except RecipeTypeError as error:
            raise type(error)(f"{self.identifier}: {name}: {error}") from None

    def takes_none(self, name: str) -> bool:
        """Whether None means something to that parameter, which is so where it is the default."""
        parameter = self.signature.parameters.get(name.lstrip("*"))
        return parameter is None or parameter.default is None

    def _binding_error(self, args: Any, kwargs: Any) -> RecipeTypeError:
        parameters = [
            p.replace(default="..." if p.default is not p.empty else p.empty, annotation=p.empty)
            for p in self.signature.parameters.values()
        ]
        shown = str(self.signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            return RecipeTypeError(f"{self.identifier}{shown.replace(chr(39), '')}: {error}")
        return RecipeTypeError(f"{self.identifier}{shown}: the arguments do not fit")

    # --- what the declaration says ---------------------------------------------------------------------------------

    def get_identifier(self) -> str:
        return self.identifier

    def get_signature(self) -> inspect.Signature:
        return self.signature

    def get_param_names(self) -> FunctionArgs[str]:
        return self.declaration.names

    def get_params(self) -> FunctionArgs[ParameterData]:
        return self.declaration.parameters

    def get_default_args(self) -> FunctionArgs[Any]:
        return self.declaration.defaults

    def get_input_types(self) -> FunctionArgs[Any]:
        return self._each(lambda data: data.interface)

    def get_input_merge_spaces(self) -> FunctionArgs[Any]:
        return self._merge_spaces

    def get_input_configs(self) -> FunctionArgs[ModelConfig | None]:
        return self._configs

    def get_return_type(self) -> Any:
        return self.declaration.result.interface

    def get_return_merge_space(self, args: Any = (), kwargs: Any = None) -> Any:
        """The merge space(s) of the result, given those of the arguments (1.0.x interface)."""
        declared = self.declaration.result.merge_space
        if isinstance(declared, MergeSpaceSymbol):
            given = [*args, *(kwargs or {}).values()]
            spaces = self.get_input_merge_spaces()
            shared = [*spaces.args_varargs(len(args)), *spaces.kwargs.values()]
            found = [g for g, s in zip(given, shared, strict=False) if s is declared]
            return found[0] if found else declared
        return declared

    def _each(self, fact: Callable[[ParameterData], Any]) -> FunctionArgs[Any]:
        p = self.declaration.parameters
        out: FunctionArgs[Any] = FunctionArgs([fact(d) for d in p.args])
        if p.has_varargs():
            out.vararg = fact(p.vararg)
        out.kwargs = {name: fact(d) for name, d in p.kwargs.items()}
        return out

    # --- what the engine calls -------------------------------------------------------------------------------------

    def instantiate(self) -> Callable[..., Any]:
        """What is called per key: the function itself, or one fresh instance per node and merge."""
        return self.__wrapped__() if inspect.isclass(self.__wrapped__) else self.__wrapped__  # type: ignore[return-value]

    def create_cache(self) -> Any:
        """The object that `merge(cache={node: ...})` expects for a node of this method; None if it keeps no cache."""
        return self.cache_factory()

    def build_key_map(self, input_configs: Mapping[str, ModelConfig], return_config: ModelConfig) -> KeyMap | None:
        """Which input keys make which output keys; None: output key k needs key k of every parameter."""
        return None if self.map_keys is None else build_key_map(self.map_keys, input_configs, return_config)


def method_of(node: MergeRecipeNode) -> MergeMethod:
    """The merge method of a node, which recipes know by a small protocol only."""
    return cast(MergeMethod, node.merge_method)
