"""What a merge method says about its inputs and its result: types, merge spaces, model configs.

The declarations are plain annotations on an ordinary function. `read_interface` turns them, once, at registration,
into the small tables that planning reads; a wrong declaration fails there, quoting the method and the parameter.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from sd_mecha.errors import RecipeTypeError
from sd_mecha.extensions import merge_spaces, model_configs
from sd_mecha.extensions.merge_spaces import MergeSpace, MergeSpaceSymbol
from sd_mecha.extensions.model_configs import ModelConfig

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

RESERVED_NAMES = frozenset({"key", "key_relation", "cache", "output_reused", "tile"})
VALUE_TYPES = (torch.Tensor, int, float, bool, str)

Spaces = MergeSpaceSymbol | frozenset[MergeSpace]


class StateDict(Mapping[str, T_co]):
    """A lazily read input: `a[key]` gives the tensor (or value) of one key, and only then is it read."""

    model_config: ModelConfig


@dataclass(frozen=True)
class ParameterData:
    """One declared input or result: its type, and what merge spaces and model config it insists on."""

    interface: Any
    merge_space: Spaces | None
    model_config: ModelConfig | None

    @cached_property
    def is_state_dict(self) -> bool:
        return typing.get_origin(self.interface) is StateDict

    @cached_property
    def value_type(self) -> Any:
        """The type of one key's value: `StateDict[X]` is X."""
        return typing.get_args(self.interface)[0] if self.is_state_dict else self.interface


class ParameterType:
    """An annotation made by `Parameter`."""

    def __init__(self, data: ParameterData) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"{type(self).__name__.removesuffix('Type')}({type_name(self.data.interface)})"


class ReturnType(ParameterType):
    """An annotation made by `Return`."""


def Parameter(
    interface: Any,
    merge_space: MergeSpace | str | Iterable[MergeSpace | str] | MergeSpaceSymbol | None = None,
    model_config: ModelConfig | str | None = None,
) -> Any:
    """Annotate a parameter of a merge method.

    Args:
        interface: `Tensor`, `int`, `float`, `bool`, `str`, `StateDict[...]` of one of them, or a TypeVar.
        merge_space: a merge space, a set of them, or a `MergeSpaceSymbol` shared with other parameters.
        model_config: a config (or its identifier) that the input must have; None shares the method's config.

    Raises:
        RecipeTypeError: the type is not one of these.
    """
    return ParameterType(_data(interface, merge_space, model_config))


def Return(
    interface: Any,
    merge_space: MergeSpace | str | Iterable[MergeSpace | str] | MergeSpaceSymbol | None = None,
    model_config: ModelConfig | str | None = None,
) -> Any:
    """Annotate the result of a merge method; the arguments are those of `Parameter`."""
    return ReturnType(_data(interface, merge_space, model_config))


def _data(interface: Any, space: Any, config: ModelConfig | str | None) -> ParameterData:
    interface = _check_type(interface)
    if isinstance(config, str):
        config = model_configs.resolve(config)
    return ParameterData(interface, _spaces(space), config)


def _spaces(space: Any) -> Spaces | None:
    if space is None or isinstance(space, MergeSpaceSymbol):
        return space
    if isinstance(space, str | MergeSpace):
        space = (space,)
    return frozenset(merge_spaces.resolve(s) if isinstance(s, str) else s for s in space)


def _check_type(interface: Any) -> Any:
    interface = _strip_optional(interface)
    inner = typing.get_args(interface)[0] if typing.get_origin(interface) is StateDict else interface
    if isinstance(inner, TypeVar) or inner in VALUE_TYPES:
        return interface
    raise RecipeTypeError(
        f"{type_name(interface)} is not a type a merge method can take or return; "
        "use Tensor, int, float, bool, str, StateDict[...] of one of them, or a TypeVar"
    )


def _strip_optional(interface: Any) -> Any:
    if typing.get_origin(interface) in (typing.Union, types.UnionType):
        rest = [t for t in typing.get_args(interface) if t is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return interface


def type_name(interface: Any) -> str:
    if typing.get_origin(interface) is StateDict:
        return f"StateDict[{type_name(typing.get_args(interface)[0])}]"
    return getattr(interface, "__name__", str(interface))


@dataclass
class FunctionArgs(Generic[T]):
    """One fact per parameter: positional ones in `args`, the `*vararg` one, keyword-only ones in `kwargs`."""

    args: list[T]
    vararg: Any = field(default_factory=types.SimpleNamespace)  # an empty namespace means: no varargs
    kwargs: dict[str, T] = field(default_factory=dict)

    def has_varargs(self) -> bool:
        return not isinstance(self.vararg, types.SimpleNamespace)

    def args_varargs(self, args_count: int | None = None) -> list[T]:
        """The fact of each of `args_count` positional arguments (None: each parameter once)."""
        if not self.has_varargs():
            return list(self.args)
        count = len(self.args) + 1 if args_count is None else args_count
        return [*self.args, *([self.vararg] * (count - len(self.args)))]

    def as_dict(self, args_count: int | None = None) -> dict[int | str, T]:
        """Facts by position (int) and by keyword (str)."""
        positional: dict[int | str, T] = dict(enumerate(self.args_varargs(args_count)))
        positional.update(self.kwargs)
        return positional


@dataclass(frozen=True)
class Interface:
    """A method's declaration, read once from its annotations."""

    signature: inspect.Signature  # without self and without **kwargs: what a recipe binds against
    names: FunctionArgs[str]
    parameters: FunctionArgs[ParameterData]
    result: ParameterData
    defaults: FunctionArgs[Any]
    default_space: MergeSpaceSymbol
    accepts_context: bool  # declares **kwargs

    def __iter__(self) -> Iterator[tuple[str, ParameterData]]:
        yield from zip(self.names.args_varargs(), self.parameters.args_varargs(), strict=True)
        yield from self.parameters.kwargs.items()


def read_interface(fn: Callable[..., Any], identifier: str, skip_self: bool) -> Interface:
    """Read the annotations of `fn`.

    Raises:
        RecipeTypeError: a parameter has no type, a reserved name or a type that no merge method can take.
    """
    try:
        signature = inspect.signature(fn, eval_str=True)
    except NameError as error:
        raise RecipeTypeError(
            f"merge method {identifier}: the annotation name {error.name!r} cannot be found; "
            "define it at module level, or drop `from __future__ import annotations` in that file"
        ) from error
    declared = list(signature.parameters.values())[1 if skip_self else 0 :]
    symbol = MergeSpaceSymbol()
    result = _annotation(signature.return_annotation, f"merge method {identifier}: the result")
    result_type = result.value_type

    names: FunctionArgs[str] = FunctionArgs([])
    parameters: FunctionArgs[ParameterData] = FunctionArgs([])
    defaults: FunctionArgs[Any] = FunctionArgs([])
    bindable: list[inspect.Parameter] = []
    shares_result_type = False
    accepts_context = False
    for p in declared:
        if p.kind is p.VAR_KEYWORD:
            accepts_context = True
            continue
        where = f"merge method {identifier}: parameter {p.name}"
        if p.name in RESERVED_NAMES:
            raise RecipeTypeError(f"{where}: the name is reserved for what the engine passes in **kwargs")
        data = _annotation(p.annotation, where)
        has_default = p.default is not p.empty
        if data.merge_space is None:
            param_only = has_default or data.value_type != result_type
            shares_result_type |= not param_only
            spaces: Spaces = frozenset({merge_spaces.resolve("param")}) if param_only else symbol
            data = ParameterData(data.interface, spaces, data.model_config)
        bindable.append(p.replace(annotation=ParameterType(data)))
        if p.kind is p.VAR_POSITIONAL:
            names.vararg, parameters.vararg = p.name, data
        elif p.kind is p.KEYWORD_ONLY:
            names.kwargs[p.name], parameters.kwargs[p.name] = p.name, data
            if has_default:
                defaults.kwargs[p.name] = p.default
        else:
            names.args.append(p.name)
            parameters.args.append(data)
            if has_default:
                defaults.args.append(p.default)
    if result.merge_space is None:
        is_value = result_type in (int, float, bool, str) and not shares_result_type
        spaces = frozenset({merge_spaces.resolve("param")}) if is_value else symbol
        result = ParameterData(result.interface, spaces, result.model_config)
    bound = inspect.Signature(bindable, return_annotation=ReturnType(result))
    return Interface(bound, names, parameters, result, defaults, symbol, accepts_context)


def _annotation(annotation: Any, where: str) -> ParameterData:
    if isinstance(annotation, ParameterType):
        return annotation.data
    if annotation is inspect.Parameter.empty:
        raise RecipeTypeError(f"{where} has no type annotation; write for example `a: Parameter(Tensor)`")
    try:
        return ParameterData(_check_type(annotation), None, None)
    except RecipeTypeError as error:
        raise RecipeTypeError(f"{where}: {error}") from None
