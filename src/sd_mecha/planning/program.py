"""The plain data of a plan: programs of numbered slots that the executor runs without deciding anything.

A *template* is the program of one output key, or of a group of keys that one call makes together; keys whose inputs
have equal shapes and dtypes share it. Slots are assigned once. *Stages* say how its steps run: a `Tiles` stage runs
its steps range by range over reused memory, a `Whole` stage runs one step on entire tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sd_mecha.extensions.key_map import RealizedKeyRelation
from sd_mecha.extensions.merge_methods import MergeMethod
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.planning.shapes import Spec
from sd_mecha.storage.contract import TensorEntry

Name = str | int | None
"""Of a key: the name itself, its place among the names of the program, or None: the key of the program."""


class Load(NamedTuple):
    """Read one tensor of a model and cast it."""

    slot: int
    reader: int
    name: Name
    stored: TensorEntry
    dtype: torch.dtype
    origin: int  # the node, to be named when the tensor turns out not to be usable
    guard: bool  # a tensor with inf or nan counts as missing


class Arg(NamedTuple):
    """One argument of a call: a slot, or the slots of a state dict by key."""

    slot: int = -1
    convert: type | torch.dtype | None = None  # computed values become that Python type, or a 0-d tensor
    by_key: tuple[tuple[Name, int], ...] | None = None
    config: ModelConfig | None = None

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,) if self.by_key is None else tuple([s for _, s in self.by_key])


class Call(NamedTuple):
    """Call a merge method; several slots where it makes several keys at once."""

    slots: tuple[int, ...]
    target: int  # index into Plan.callables
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    inputs: tuple[int, ...]  # every slot that an argument mentions
    relation: RealizedKeyRelation | int | None  # or its place in the program; None: key k from k of every parameter
    reused: bool
    tiled: bool
    why: str  # why it sees tiles, or entire tensors
    key: Name = None
    assumed: bool = False  # the method could not run on the meta device
    origin: int = -1

    def all_args(self) -> tuple[Arg, ...]:
        return (*self.args, *(a for _, a in self.kwargs))


Step = Load | Call


@dataclass(frozen=True, slots=True)
class Output:
    """A slot that is written."""

    slot: int
    target: int  # which of several recipes merged together
    name: Name
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Tiles:
    """Steps that run range by range. `keeps` are assembled into whole tensors for later stages."""

    numel: int
    steps: tuple[Step, ...]
    frees: tuple[tuple[int, ...], ...]  # slots that are dead after each step
    writes: tuple[Output, ...]
    keeps: tuple[int, ...]
    deferred: frozenset[int]  # loads that a state dict parameter reads on demand, one at a time
    align: int  # tiles start at multiples of this many elements
    element_bytes: int  # live bytes per element while a tile runs
    row: int = 0  # elements of a row where a step sees rows, else 0


@dataclass(frozen=True, slots=True)
class Whole:
    """One step on entire tensors."""

    step: Step


@dataclass(frozen=True, slots=True)
class Store:
    """Write a slot that holds an entire tensor."""

    output: Output


Stage = Tiles | Whole | Store


@dataclass(frozen=True)
class Callee:
    """What a call calls: a method, and the cache that the caller keeps for its node."""

    method: MergeMethod
    cache: Any = None


@dataclass
class Template:
    steps: tuple[Step, ...]
    constants: Mapping[int, Any]
    specs: tuple[Spec, ...]
    outputs: tuple[Output, ...]
    stages: tuple[Stage, ...] = ()
    frees: tuple[tuple[int, ...], ...] = ()  # whole-tensor slots that are dead after each stage
    whole_bytes: int = 0  # peak bytes of entire tensors
    notes: list[str] = field(default_factory=list)

    def shape(self, slot: int) -> tuple[int, ...]:
        """The shape of what a slot holds; of numbers, that of a scalar."""
        spec = self.specs[slot]
        return spec.shape if isinstance(spec, TensorEntry) else ()


@dataclass(frozen=True, slots=True)
class Program:
    """A template at a key.

    Attributes:
        template: the template.
        key: of the program; the first one where it makes several.
        names, relations: those that its steps refer to by their place.
    """

    template: Template
    key: str
    names: tuple[str, ...] = ()
    relations: tuple[RealizedKeyRelation, ...] = ()

    def name(self, name: Name) -> str:
        """A name in full."""
        if isinstance(name, int):
            return self.names[name]
        return self.key if name is None else name

    @property
    def outputs(self) -> list[tuple[int, str, TensorEntry]]:
        return [(o.target, self.name(o.name), o.entry) for o in self.template.outputs]
