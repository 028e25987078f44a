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


class Load(NamedTuple):
    """Read one tensor of a model and cast it."""

    slot: int
    reader: int
    name: str | None  # None: the key of the program
    stored: TensorEntry
    dtype: torch.dtype
    origin: int  # the node, to be named when the tensor turns out not to be usable
    guard: bool  # a tensor with inf or nan counts as missing


class Arg(NamedTuple):
    """One argument of a call: a slot, or the slots of a state dict by key."""

    slot: int = -1
    convert: type | torch.dtype | None = None  # computed values become that Python type, or a 0-d tensor
    by_key: tuple[tuple[str | None, int], ...] | None = None
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
    relation: RealizedKeyRelation | None  # None: key k from key k of every parameter
    reused: bool
    tiled: bool
    why: str  # why it sees tiles, or entire tensors
    key: str | None = None  # None: the key of the program
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
    name: str | None  # None: the key of the program
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


@dataclass(frozen=True, slots=True)
class Program:
    """A template at a key; `key` is None where the template names its keys itself."""

    template: Template
    key: str | None

    def name(self, name: str | None) -> str:
        found = self.key if name is None else name
        assert found is not None
        return found

    @property
    def outputs(self) -> list[tuple[int, str, TensorEntry]]:
        return [(o.target, self.name(o.name), o.entry) for o in self.template.outputs]
