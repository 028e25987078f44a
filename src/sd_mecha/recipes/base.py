"""What all recipe nodes share: identity by structure, operators, iteration.

Nodes are frozen. Each carries a structural fingerprint, computed once from the fingerprints of its children.
Equality and hashing take constant time, however large the recipe below is, and equal sub-graphs are shared.
Tensors, in-memory models and merge methods enter it by identity: a node keeps what it fingerprints alive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sd_mecha.recipes import provider
from sd_mecha.recipes.provider import Named
from sd_mecha.recipes.walk import toposort

if TYPE_CHECKING:
    from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode


class RecipeNode:
    """Base of all nodes; abstract, but without the metaclass of `ABC`, which makes `isinstance` slower.

    Attributes:
        model_config: the config the node is declared to have, or None to let inference choose.
        merge_space: the merge space it is declared to be in, or None to let inference choose.
        children: the nodes it is made from, in order.
        fingerprint: 16 bytes, equal for two nodes exactly when they are structurally equal.
    """

    __slots__ = ("__weakref__", "children", "fingerprint", "merge_space", "model_config")

    model_config: Named | None
    merge_space: Named | None
    children: tuple[RecipeNode, ...]
    fingerprint: bytes

    # makes `np.float32(2) * node` come to `__rmul__`: NumPy would take the node for an array of objects
    __array_ufunc__: ClassVar[None] = None

    def _freeze(
        self,
        config: Named | str | None,
        space: Named | str | None,
        children: tuple[RecipeNode, ...],
        content: tuple[Any, ...],
        body: bytes = b"",
    ) -> None:
        """Set the common attributes; `content` and `body` say all that tells this node from others."""
        if isinstance(config, str):
            config = provider.current().config(config)
        if isinstance(space, str):
            space = provider.current().space(space)
        freeze(self, "model_config", config)
        freeze(self, "merge_space", space)
        freeze(self, "children", children)
        names = (None if config is None else config.identifier, None if space is None else space.identifier)
        # repr escapes lone surrogates, so the text can always be encoded
        data = repr((content, names)).encode() + body
        freeze(self, "fingerprint", blake2b(data, digest_size=16).digest())

    @abstractmethod
    def with_children(self, children: Sequence[RecipeNode]) -> RecipeNode:
        """Return the same node over other children, given in the order of `self.children`."""

    @abstractmethod
    def accept(self, visitor: RecipeVisitor, *args: Any, **kwargs: Any) -> Any:
        """Call the visitor's method for this kind of node. Walks over whole recipes are in `recipes.walk`."""

    @abstractmethod
    def label(self) -> str:
        """Name the node in one short piece of text, its children left out, for messages."""

    def __repr__(self) -> str:
        shown = [child.label() for child in self.children[:4]] + ["..."] * (len(self.children) > 4)
        return f"<{self.label()} of {', '.join(shown)}>" if shown else f"<{self.label()}>"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot set {name!r}: recipe nodes are frozen, build a new node instead")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete {name!r}: recipe nodes are frozen")

    def __copy__(self) -> RecipeNode:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RecipeNode:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecipeNode):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __iter__(self) -> Iterator[RecipeNode]:
        """Yield every distinct node below and including this one, children before parents."""
        return iter(toposort(self))

    def __contains__(self, item: object) -> bool:
        """Tell whether a structurally equal node is part of this recipe."""
        return isinstance(item, RecipeNode) and any(node.fingerprint == item.fingerprint for node in self)

    def __add__(self, other: Any) -> RecipeNode:
        return _call("add_difference", self, other)

    def __radd__(self, other: Any) -> RecipeNode:
        return _call("add_difference", other, self)

    def __sub__(self, other: Any) -> RecipeNode:
        return _call("subtract", self, other)

    def __rsub__(self, other: Any) -> RecipeNode:
        return _call("subtract", other, self)

    def __mul__(self, other: Any) -> RecipeNode:
        return _call("scale", self, other)

    def __rmul__(self, other: Any) -> RecipeNode:
        return _call("scale", self, other)

    def __or__(self, other: Any) -> RecipeNode:
        return _call("fallback", self, other)

    def __ror__(self, other: Any) -> RecipeNode:
        return _call("fallback", other, self)

    def to(self, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> RecipeNode:
        """Return the `cast` of this node to a device, a dtype, or both; None leaves that one as it is."""
        return _call(
            "cast",
            self,
            device=None if device is None else str(device),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )


class RecipeVisitor(ABC):
    """One method per kind of node, for code outside the library; `node.accept(visitor)` calls the right."""

    @abstractmethod
    def visit_literal(self, node: LiteralRecipeNode, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def visit_model(self, node: ModelRecipeNode, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def visit_merge(self, node: MergeRecipeNode, *args: Any, **kwargs: Any) -> Any: ...


freeze = object.__setattr__
"""Sets an attribute of a node while it is being built."""


def _call(method: str, /, *args: Any, **kwargs: Any) -> RecipeNode:
    return provider.current().method(method)(*args, **kwargs)
