"""Merge methods: ordinary typed functions that a recipe can name.

    @merge_method(tiling="elementwise")
    def weighted_sum(a: Parameter(Tensor), b: Parameter(Tensor), alpha: Parameter(Tensor) = 0.5) -> Return(Tensor):
        return torch.lerp(a, b, alpha)

Calling a method does not compute: it returns a recipe node that binds the arguments. The engine calls the plain
function later, for each key, with values it has read. `tiling` states what the function promises:

    whole        sees entire tensors; always correct, and the default
    elementwise  element i of the result depends on element i of the tensors and on scalars alone: the engine may pass
                 any flat range; a generator may first `yield` reductions over the whole tensor (see `reductions`)
    rows         the same promise for the first dimension
    select       the result is, bit for bit, the one input that the key map realised; nothing is computed
    shape        the result depends on shape, dtype and device alone; evaluated while planning, no byte is read
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, overload

from sd_mecha.errors import RecipeTypeError, StateDictKeyError
from sd_mecha.recipes.nodes import MergeRecipeNode, RecipeNode
from sd_mecha.extensions.key_map import KeyMap, build_key_map
from sd_mecha.extensions.merge_spaces import MergeSpaceSymbol
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.extensions.parameters import (
    FunctionArgs,
    Interface,
    Parameter,
    ParameterData,
    ParameterType,
    Return,
    ReturnType,
    StateDict,
    T,
    read_interface,
)
from sd_mecha.extensions.registry import Registry
from sd_mecha.extensions.values import RecipeNodeOrValue, value_to_node

__all__ = [
    "CandidateDispatchError",
    "FunctionArgs",
    "MergeMethod",
    "MergeMethodInterface",
    "Parameter",
    "ParameterData",
    "ParameterType",
    "RecipeNodeOrValue",
    "Return",
    "ReturnType",
    "StateDict",
    "StateDictKeyError",
    "T",
    "get_all",
    "get_all_converters",
    "get_converter_paths",
    "merge_method",
    "resolve",
    "skip_key",
    "validate_config_converter",
    "value_to_node",
]

Tiling = Literal["whole", "elementwise", "rows", "select", "shape"]

_registry: Registry[MergeMethod] = Registry("merge method")


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
        self.is_conversion = is_conversion
        self.interface = interface
        call = fn_or_cls.__call__ if inspect.isclass(fn_or_cls) else fn_or_cls
        self.streamed = inspect.isgeneratorfunction(call)
        self.map_keys: Callable[[Any], None] | None = getattr(fn_or_cls, "map_keys", None)
        self._default_nodes: dict[str, RecipeNode] = {}

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
        if value is None and self._default_of(name) is not None:
            raise RecipeTypeError(f"{self.identifier}: {name} is None; expected a value of type {data.value_type}")
        try:
            return value_to_node(value, data.interface)
        except RecipeTypeError as error:
            raise type(error)(f"{self.identifier}: {name}: {error}") from None

    def _default_of(self, name: str) -> Any:
        parameter = self.signature.parameters.get(name.lstrip("*"))
        return None if parameter is None else parameter.default

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
        return self._each(lambda data: data.merge_space)

    def get_input_configs(self) -> FunctionArgs[ModelConfig | None]:
        return self._each(lambda data: data.model_config)

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
        return self.__wrapped__() if inspect.isclass(self.__wrapped__) else self.__wrapped__

    def create_cache(self) -> Any:
        """The object that `merge(cache={node: ...})` expects for a node of this method; None if it keeps no cache."""
        return self.cache_factory()

    def build_key_map(self, input_configs: Mapping[str, ModelConfig], return_config: ModelConfig) -> KeyMap | None:
        """Which input keys make which output keys; None: output key k needs key k of every parameter."""
        return None if self.map_keys is None else build_key_map(self.map_keys, input_configs, return_config)


@overload
def merge_method(fn: Callable[..., Any]) -> MergeMethod: ...
@overload
def merge_method(
    *,
    identifier: str | None = None,
    register: bool = True,
    is_conversion: bool = False,
    implements: MergeMethod | None = None,
    is_interface: bool = False,
    reuse_outputs: bool = True,
    cache_factory: Callable[[], Any] = NoneType,
    tiling: Tiling = "whole",
) -> Callable[[Callable[..., Any]], MergeMethod]: ...
def merge_method(
    fn: Callable[..., Any] | None = None,
    *,
    identifier: str | None = None,
    register: bool = True,
    is_conversion: bool = False,
    implements: MergeMethod | None = None,
    is_interface: bool = False,
    reuse_outputs: bool = True,
    cache_factory: Callable[[], Any] = NoneType,
    tiling: Tiling = "whole",
) -> Any:
    """Make a merge method of a function, or of a class with `__call__` and optionally a static `map_keys(builder)`.

    Args:
        identifier: the name in recipes; by default the function's.
        register: whether `resolve(identifier)` finds it.
        is_conversion: takes one positional state dict of one config and returns another config.
        implements: the interface method that this one implements for its model config.
        is_interface: the body is empty; implementations are chosen by model config when planning.
        reuse_outputs: whether a result may be kept for a second consumer instead of computed again.
        cache_factory: makes the object that `merge(cache={node: object})` hands to the method as `cache`.
        tiling: what the function promises about pieces of a tensor; see the module's text.

    Raises:
        RecipeTypeError: the declaration is not one that a merge method can have.
        DuplicateNameError: the identifier is taken.
    """
    options = dict(
        identifier=identifier,
        register=register,
        is_conversion=is_conversion,
        implements=implements,
        is_interface=is_interface,
        reuse_outputs=reuse_outputs,
        cache_factory=cache_factory,
        tiling=tiling,
    )
    if fn is None:
        return lambda f: _make(f, **options)
    return _make(fn, **options)


def _make(
    fn: Callable[..., Any],
    *,
    identifier: str | None,
    register: bool,
    is_conversion: bool,
    implements: MergeMethod | None,
    is_interface: bool,
    reuse_outputs: bool,
    cache_factory: Callable[[], Any],
    tiling: Tiling,
) -> MergeMethod:
    is_class = inspect.isclass(fn)
    identifier = identifier or fn.__name__
    if tiling not in get_args(Tiling):
        raise RecipeTypeError(f"merge method {identifier}: tiling={tiling!r}; expected one of {get_args(Tiling)}")
    declaration = read_interface(fn.__call__ if is_class else fn, identifier, skip_self=is_class)
    if is_interface and declaration.parameters.kwargs:
        raise RecipeTypeError(f"interface {identifier}: keyword-only parameters are not allowed in an interface")
    method = MergeMethod(
        fn,
        identifier,
        declaration,
        tiling=tiling,
        reuse_outputs=reuse_outputs,
        cache_factory=cache_factory,
        is_conversion=is_conversion,
        interface=MergeMethodInterface(identifier) if is_interface else None,
    )
    if method.streamed and tiling != "elementwise":
        raise RecipeTypeError(f'merge method {identifier} yields reductions: declare tiling="elementwise"')
    if is_conversion:
        validate_config_converter(method)
    if implements is not None:
        _check_implementation(method, implements)
        assert implements.interface is not None
        implements.interface.register_implementation(method)
    if register:
        _registry.register(identifier, method)
    return method


def validate_config_converter(merge_method: MergeMethod) -> None:
    """Check that a method may serve as a conversion.

    Raises:
        RecipeTypeError: it does not take exactly one state dict of one config and return another config.
    """
    p, result = merge_method.declaration.parameters, merge_method.declaration.result
    what = f"conversion {merge_method.identifier}"
    if len(p.args) != 1 or p.has_varargs() or not p.args[0].is_state_dict:
        raise RecipeTypeError(f"{what}: expected exactly one positional parameter, a StateDict[...]")
    source = p.args[0].model_config
    if source is None:
        raise RecipeTypeError(f"{what}: the parameter names no model config")
    generic = merge_method.map_keys is not None and result.model_config is None
    if not generic and (result.model_config is None or result.model_config.identifier == source.identifier):
        raise RecipeTypeError(f"{what}: the result must name a model config other than {source.identifier}")


def _check_implementation(method: MergeMethod, interface: MergeMethod) -> None:
    if interface.interface is None:
        raise RecipeTypeError(f"{method.identifier} implements {interface.identifier}, which is not an interface")
    ours, theirs = method.declaration.names, interface.declaration.names
    if ours.args != theirs.args or ours.has_varargs() != theirs.has_varargs():
        raise RecipeTypeError(
            f"{method.identifier} takes {ours.args}, its interface {interface.identifier} takes {theirs.args}"
        )


def resolve(identifier: str) -> MergeMethod:
    """The merge method of that name; UnknownNameError (a KeyError) suggests the nearest one."""
    return _registry.resolve(identifier)


def get_all() -> list[MergeMethod]:
    """Every registered merge method, in order of registration."""
    return list(_registry.get_all())


def get_all_converters() -> list[MergeMethod]:
    """The registered conversions between two model configs."""
    return [m for m in get_all() if m.is_conversion and m.declaration.result.model_config is not None]


def get_converter_paths() -> dict[str, list[tuple[str, MergeMethod]]]:
    """The graph of conversions: source config -> (target config, method)."""
    paths: dict[str, list[tuple[str, MergeMethod]]] = {}
    for method in get_all_converters():
        source, target = method.declaration.parameters.args[0].model_config, method.declaration.result.model_config
        assert source is not None
        assert target is not None
        paths.setdefault(source.identifier, []).append((target.identifier, method))
    return paths


def skip_key(key: str) -> None:
    """Leave `key` out of the result: it is then missing, or comes from the fallback.

    Raises:
        StateDictKeyError: always; that is how the engine is told.
    """
    raise StateDictKeyError(key)
