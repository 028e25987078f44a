"""The three kinds of recipe node: model, literal and merge."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch

from sd_mecha.errors import RecipeTypeError
from sd_mecha.recipes.base import RecipeNode as RecipeNode
from sd_mecha.recipes.base import RecipeVisitor as RecipeVisitor
from sd_mecha.recipes.base import freeze
from sd_mecha.recipes.provider import Method, Named
from sd_mecha.storage.remote.addresses import shown_path


class ModelRecipeNode(RecipeNode):
    """A model: a file, by path, or a state dict or a module in memory.

    Args:
        path: path of a file (not opened here), or a mapping of keys to tensors or a `torch.nn.Module`, which count by
            identity.
        model_config: config, or its name, or None to infer it.
        merge_space: merge space, or its name, or None to infer it.

    Attributes:
        path: the path, or None for a model in memory.
        memory: the mapping or the module, or None for a model in a file.
    """

    __slots__ = ("memory", "path")

    path: str | None
    memory: Mapping[str, Any] | torch.nn.Module | None

    def __init__(
        self,
        path: str | os.PathLike[str] | Mapping[str, Any] | torch.nn.Module,
        model_config: Named | str | None = None,
        merge_space: Named | str | None = None,
    ) -> None:
        if isinstance(path, Mapping | torch.nn.Module):
            freeze(self, "path", None)
            freeze(self, "memory", path)
            content: tuple[Any, ...] = ("memory", id(path))
        elif isinstance(path, (str, os.PathLike)):
            freeze(self, "path", _normal_path(path))
            freeze(self, "memory", None)
            content = ("model", self.path)
        else:
            raise RecipeTypeError(f"a model is a path, a dict of tensors or a torch module, not {type(path).__name__}")
        self._freeze(model_config, merge_space, (), content)

    @property
    def state_dict(self) -> Mapping[str, Any] | None:
        """The mapping, or None for a model in a file; that of a module is made anew, of the tensors it has now.

        What a module keeps there beside tensors, its extra state, is left out.
        """
        if isinstance(self.memory, torch.nn.Module):
            return {key: value for key, value in self.memory.state_dict().items() if isinstance(value, torch.Tensor)}
        return self.memory

    def with_children(self, children: Sequence[RecipeNode]) -> RecipeNode:
        return self

    def accept(self, visitor: RecipeVisitor, *args: Any, **kwargs: Any) -> Any:
        return visitor.visit_model(self, *args, **kwargs)

    def label(self) -> str:
        if isinstance(self.memory, torch.nn.Module):
            return f"module {type(self.memory).__name__}"
        if self.path is None:
            return f"model in memory ({len(self.memory or ())} keys)"
        return f"model {_short(shown_path(self.path))!r}"


class LiteralRecipeNode(RecipeNode):
    """A dict of keys to values that stands in the recipe itself.

    Args:
        value_dict: keys (str) to None, bool, int, float, str, tensor or recipe node. It is copied; treat the
            copy as read-only. The order of the keys does not matter to equality.
        model_config: config, or its name, or None to infer it.
        merge_space: merge space, or its name, or None to infer it.

    Raises:
        RecipeTypeError: a key is not a str, or a value is of another type.
    """

    __slots__ = ("value_dict",)

    value_dict: dict[str, Any]

    def __init__(
        self,
        value_dict: Mapping[str, Any],
        model_config: Named | str | None = None,
        merge_space: Named | str | None = None,
    ) -> None:
        if not isinstance(value_dict, Mapping):
            raise RecipeTypeError(f"a literal holds a dict, got {type(value_dict).__name__}")
        values = dict(value_dict)
        for key in values:
            if not isinstance(key, str):
                raise RecipeTypeError(f"the keys of a literal are str, got {type(key).__name__}: {key!r}")
        freeze(self, "value_dict", values)
        children = tuple([value for value in values.values() if isinstance(value, RecipeNode)])
        content = [(str.__str__(key), _value_token(key, value)) for key, value in values.items()]
        if len(content) > 1:
            content.sort()
        self._freeze(model_config, merge_space, children, ("literal", *content))

    @property
    def value(self) -> dict[str, Any]:
        """The dict, under the name it had in 1.0."""
        return self.value_dict

    def with_children(self, children: Sequence[RecipeNode]) -> RecipeNode:
        replace = iter(children)
        values = {k: next(replace) if isinstance(v, RecipeNode) else v for k, v in self.value_dict.items()}
        return LiteralRecipeNode(values, self.model_config, self.merge_space)

    def accept(self, visitor: RecipeVisitor, *args: Any, **kwargs: Any) -> Any:
        return visitor.visit_literal(self, *args, **kwargs)

    def label(self) -> str:
        items = list(self.value_dict.items())[:3]
        shown = [f"{_short(key)!r}: {_short_value(value)}" for key, value in items]
        return "literal {" + ", ".join(shown + ["..."] * (len(self.value_dict) > 3)) + "}"


class MergeRecipeNode(RecipeNode):
    """A merge method applied to nodes.

    Calling the method is the usual way to build one: it wraps Python values and checks the arguments. This
    constructor takes arguments that are nodes already.

    Args:
        merge_method: the method object, kept by reference.
        bound_args: its bound arguments, each a node (or a tuple of nodes for `*args`).
        model_config: config, or its name, or None to infer it.
        merge_space: merge space, or its name, or None to infer it.

    Attributes:
        args: the positional arguments, those of `*args` included.
        kwargs: the named ones.
        cache: what `set_cache` was given, or None; no part of what makes two nodes equal.

    Raises:
        RecipeTypeError: an argument is not a node.
    """

    __slots__ = ("args", "cache", "kwargs", "merge_method")

    merge_method: Method
    args: tuple[RecipeNode, ...]
    kwargs: dict[str, RecipeNode]
    cache: Any

    def __init__(
        self,
        merge_method: Method,
        bound_args: inspect.BoundArguments,
        model_config: Named | str | None = None,
        merge_space: Named | str | None = None,
    ) -> None:
        self._fill(merge_method, tuple(bound_args.args), dict(bound_args.kwargs), model_config, merge_space)

    @classmethod
    def of(
        cls,
        merge_method: Method,
        args: Sequence[RecipeNode],
        kwargs: Mapping[str, RecipeNode],
        model_config: Named | str | None = None,
        merge_space: Named | str | None = None,
    ) -> MergeRecipeNode:
        """Build a node from its positional and its named arguments, trusting that they fit the signature."""
        node = cls.__new__(cls)
        node._fill(merge_method, tuple(args), dict(kwargs), model_config, merge_space)
        return node

    def _fill(
        self,
        method: Method,
        args: tuple[RecipeNode, ...],
        kwargs: dict[str, RecipeNode],
        config: Named | str | None,
        space: Named | str | None,
    ) -> None:
        children = (*args, *kwargs.values()) if kwargs else args
        for child in children:
            if not isinstance(child, RecipeNode):
                raise RecipeTypeError(
                    f"merge method {method.identifier!r}: the arguments of a merge node are nodes, got "
                    f"{type(child).__name__}; call the method itself to have Python values wrapped"
                )
        freeze(self, "merge_method", method)
        freeze(self, "args", args)
        freeze(self, "kwargs", kwargs)
        freeze(self, "cache", None)
        body = b"".join([child.fingerprint for child in children])
        self._freeze(config, space, children, ("merge", _method_token(method), len(args), *kwargs), body)

    @property
    def bound_args(self) -> inspect.BoundArguments:
        """The arguments bound to the method's signature (a new object each time)."""
        return self.merge_method.signature.bind_partial(*self.args, **self.kwargs)

    def create_cache(self) -> Any:
        """Make the object that the method declared as its cache, for `merge(cache={node: ...})`.

        Returns:
            The new cache, or None where the method declared none.
        """
        return self.merge_method.create_cache()

    def set_cache(self, cache: Any) -> MergeRecipeNode:
        """Give the node an object to keep between merges, for those that are not given another one for it.

        Args:
            cache: what `create_cache` makes, or None to forget it.

        Returns:
            The node itself.
        """
        freeze(self, "cache", cache)
        return self

    def with_children(self, children: Sequence[RecipeNode]) -> RecipeNode:
        count = len(self.args)
        kwargs = dict(zip(self.kwargs, children[count:], strict=True))
        node = self.of(self.merge_method, children[:count], kwargs, self.model_config, self.merge_space)
        return node.set_cache(self.cache)

    def accept(self, visitor: RecipeVisitor, *args: Any, **kwargs: Any) -> Any:
        return visitor.visit_merge(self, *args, **kwargs)

    def label(self) -> str:
        return f"merge {_short(self.merge_method.identifier)!r}"


def _normal_path(path: str | os.PathLike[str]) -> str:
    """Drop `./` and doubled slashes, so that a file has one spelling, with `/` on every system.

    An address with a scheme, `https://...`, stays as it is.
    """
    text = str.__str__(os.fspath(path))
    return text if not text or "://" in text else PurePath(text).as_posix()


def _value_token(key: str, value: Any) -> tuple[str, ...]:
    """Say what a value is: equal exactly for equal values of one type, and sortable."""
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return ("bool", "true" if value else "false")
    if isinstance(value, int):
        return (
            "int",
            int.__format__(value, "x"),
        )  # decimal would take quadratic time, and Python limits its length
    if isinstance(value, float):
        return ("float", float.__repr__(value))
    if isinstance(value, str):
        return ("str", str.__str__(value))
    if isinstance(value, RecipeNode):
        return ("node", value.fingerprint.hex())
    if isinstance(value, torch.Tensor):
        return ("tensor", str(id(value)))
    raise RecipeTypeError(
        f"literal value at key {_short(key)!r}: got {type(value).__name__}, expected None, bool, int, float, "
        "str, a tensor or a recipe node"
    )


_first_of_name: dict[str, weakref.ref[Any]] = {}
_method_tokens: weakref.WeakKeyDictionary[Method, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def _method_token(method: Method) -> tuple[Any, ...]:
    """Name a method: the first object seen under an identifier goes by it alone, others by their address too.

    Methods need not be registered, so two may share an identifier: their nodes must not be equal. A method keeps its
    token, whatever becomes of the first of its name.
    """
    token = _method_tokens.get(method)
    if token is None:
        identifier = method.identifier
        known = _first_of_name.get(identifier)
        if known is None or known() is None:  # no node holds a method of this name
            _first_of_name[identifier] = weakref.ref(method)
            token = (identifier,)
        else:
            token = (identifier, id(method))
        _method_tokens[method] = token
    return token


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:28] + "..." + text[-29:]


def _short_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}"
    if isinstance(value, RecipeNode):
        return "..."
    if isinstance(value, int) and value.bit_length() > 128:
        return f"int of {value.bit_length()} bits"
    return repr(_short(value)) if isinstance(value, str) else repr(value)
