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
    pieces       sees entire tensors, but makes one flat range of the result at a time, named by `tile`, so that a large
                 result of small inputs is never held; without a `tile` it makes the entire result. A class may have a
                 static `in_pieces(key_relation)` that says for which keys it can, and a method `prepare`, which is
                 called once for a tensor with the arguments of a call, the `tile` being all of it, and returns what
                 is called with each tile. Where that is `addable`, `add_to(total, tile, weight)` adds a range times
                 a number to a tensor of that range, and `join` makes one of several of equal `form`, given with a
                 number each
    select       the result is, bit for bit, the one input that the key map realised; nothing is computed
    shape        the result depends on shape, dtype and device alone; evaluated while planning, no byte is read
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType, NoneType
from typing import Any, Protocol, get_args, overload

from sd_mecha.errors import RecipeTypeError, StateDictKeyError
from sd_mecha.extensions.method import CandidateDispatchError, MergeMethod, MergeMethodInterface, Tiling
from sd_mecha.extensions.parameters import (
    FunctionArgs,
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
    "get_conversions_from",
    "get_converter_paths",
    "merge_method",
    "register_conversions",
    "resolve",
    "skip_key",
    "validate_config_converter",
    "value_to_node",
]

_registry: Registry[MergeMethod] = Registry("merge method")


class Conversions(Protocol):
    """Conversions that are made when they are asked for."""

    def method(self, identifier: str) -> MergeMethod | None:
        """The conversion of that name, None if there is none."""

    def starting_at(self, identifier: str) -> list[tuple[str, MergeMethod]]:
        """The identifiers of configs that one step leads to from a config, each with the conversion."""


_conversions: list[Conversions] = []


def register_conversions(source: Conversions) -> None:
    """Add conversions that are made when they are asked for."""
    _conversions.append(source)


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
    default_factories: Mapping[str, Callable[[], RecipeNodeOrValue]] = MappingProxyType({}),
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
    default_factories: Mapping[str, Callable[[], RecipeNodeOrValue]] = MappingProxyType({}),
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
        default_factories: by name of a parameter whose default is None, what makes its value for each new node
            that leaves it out or gives None; the value then stands in the recipe, as a seed that is drawn once.
        tiling: what the function promises about pieces of a tensor; see the module's text.

    Raises:
        RecipeTypeError: the declaration is not one that a merge method can have.
        DuplicateNameError: the identifier is taken.
    """

    def make(fn: Callable[..., Any]) -> MergeMethod:
        method = _declare(
            fn, identifier, tiling, reuse_outputs, cache_factory, default_factories, is_conversion, is_interface
        )
        if implements is not None:
            _implement(method, implements)
        if register:
            _registry.register(method.identifier, method)
        return method

    return make if fn is None else make(fn)


def _declare(
    fn: Callable[..., Any],
    name: str | None,
    tiling: Tiling,
    reuse_outputs: bool,
    cache_factory: Callable[[], Any],
    default_factories: Mapping[str, Callable[[], RecipeNodeOrValue]],
    is_conversion: bool,
    is_interface: bool,
) -> MergeMethod:
    """The method that a function or class declares, checked."""
    identifier = name or fn.__name__
    if tiling not in get_args(Tiling):
        raise RecipeTypeError(f"merge method {identifier}: tiling={tiling!r}; expected one of {get_args(Tiling)}")
    call: Callable[..., Any] = getattr(fn, "__call__") if inspect.isclass(fn) else fn  # noqa: B004, B009
    declaration = read_interface(call, identifier, skip_self=inspect.isclass(fn))
    for name in default_factories:
        if name not in declaration.signature.parameters or declaration.signature.parameters[name].default is not None:
            raise RecipeTypeError(
                f"merge method {identifier}: default_factories names {name!r}, which is no parameter of default None"
            )
    if is_interface and declaration.parameters.kwargs:
        raise RecipeTypeError(f"interface {identifier}: keyword-only parameters are not allowed in an interface")
    method = MergeMethod(
        fn,
        identifier,
        declaration,
        tiling=tiling,
        reuse_outputs=reuse_outputs,
        cache_factory=cache_factory,
        default_factories=default_factories,
        is_conversion=is_conversion,
        interface=MergeMethodInterface(identifier) if is_interface else None,
    )
    if method.streamed and tiling != "elementwise":
        raise RecipeTypeError(f'merge method {identifier} yields reductions: declare tiling="elementwise"')
    if is_conversion:
        validate_config_converter(method)
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


def _implement(method: MergeMethod, interface: MergeMethod) -> None:
    if interface.interface is None:
        raise RecipeTypeError(f"{method.identifier} implements {interface.identifier}, which is not an interface")
    ours, theirs = method.declaration.names, interface.declaration.names
    if ours.args != theirs.args or ours.has_varargs() != theirs.has_varargs():
        raise RecipeTypeError(
            f"{method.identifier} takes {ours.args}, its interface {interface.identifier} takes {theirs.args}"
        )
    interface.interface.register_implementation(method)


def resolve(identifier: str) -> MergeMethod:
    """The merge method of that name; UnknownNameError (a KeyError) suggests the nearest one."""
    if isinstance(identifier, str) and identifier not in _registry:
        for source in _conversions:
            found = source.method(identifier)
            if found is not None:
                return found
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
        source, target = (
            method.declaration.parameters.args[0].model_config,
            method.declaration.result.model_config,
        )
        assert source is not None
        assert target is not None
        paths.setdefault(source.identifier, []).append((target.identifier, method))
    return paths


def get_conversions_from(identifier: str) -> list[tuple[str, MergeMethod]]:
    """The identifiers of configs that one conversion leads to from a config, each with the conversion."""
    made = [step for source in _conversions for step in source.starting_at(identifier)]
    return [*get_converter_paths().get(identifier, []), *made]


def skip_key(key: str) -> None:
    """Leave `key` out of the result: it is then missing, or comes from the fallback.

    Raises:
        StateDictKeyError: always; that is how the engine is told.
    """
    raise StateDictKeyError(key)
