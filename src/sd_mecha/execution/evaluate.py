"""Calling merge methods on values, and checking what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor

from sd_mecha.errors import ContractError, StateDictKeyError
from sd_mecha.extensions.key_relations import RealizedKeyRelation
from sd_mecha.extensions.method import MergeMethod
from sd_mecha.extensions.tile import Tile
from sd_mecha.planning.arguments import Values, as_type
from sd_mecha.planning.keys import identity_relation
from sd_mecha.planning.program import Arg, Call, Callee, Program
from sd_mecha.storage.contract import TensorEntry


class Missing(Exception):
    """Something that the running program relies on does not exist after all."""

    def __init__(self, origin: int, keys: tuple[str, ...], reason: str, deliberate: bool = False) -> None:
        super().__init__(reason)
        self.origin = origin
        self.keys = keys
        self.reason = reason
        self.deliberate = deliberate


class Deferred:
    """A tensor that is read when a state dict parameter asks for it."""

    __slots__ = ("read",)

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self.read = read


class _LazyValues(Values):
    """A state dict parameter whose values are read on demand, and cast where the parameter declares another type."""

    def __init__(self, values: Mapping[str, Any], arg: Arg, method: str) -> None:
        super().__init__(values, arg.config, method)
        self._convert = arg.convert

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, Deferred):
            value = value.read()
        return value if self._convert is None or value is None else as_type(value, self._convert)


class _Named:
    """See `Caller.named`. A class, since it is entered for every tile."""

    __slots__ = ("_method", "_program", "_step")

    def __init__(self, step: Call, program: Program, method: str) -> None:
        self._step = step
        self._program = program
        self._method = method

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, StateDictKeyError):
            raise skipped(self._step, self._program, self._method) from error
        if isinstance(error, Exception) and not isinstance(error, Missing):
            key = self._program.name(self._step.key)
            explain_failure(error, f"merge method {self._method} failed at key {key!r}")


class Caller:
    """Calls the methods of one plan; keeps the one instance per node that class methods have."""

    def __init__(self, callees: Any, validate: bool) -> None:
        self._callees = callees
        self._validate = validate
        self._instances: dict[int, Callable[..., Any]] = {}

    def __call__(self, step: Call, values: MutableMapping[int, Any], program: Program, tile: Tile | None = None) -> Any:
        """The raw result: a tensor, a Python value, a dict of them, or a generator of reductions.

        Raises:
            Missing: the method skips this key.
        """
        args, kwargs = self._bind(step, values, program, tile)
        with self.named(step, program):
            return self._instance(step.target)(*args, **kwargs)

    def maker(self, step: Call, values: MutableMapping[int, Any], program: Program, whole: Tile) -> Any:
        """What makes ranges of a result in pieces: it is called with each tile, and finds what they share only once.

        Args:
            whole: all of the result.

        Raises:
            Missing: the method skips this key.
        """
        prepare = getattr(self._instance(step.target), "prepare", None)
        if prepare is None:
            return partial(self, step, {slot: values[slot] for slot in step.inputs}, program)
        args, kwargs = self._bind(step, values, program, whole)
        with self.named(step, program):
            return prepare(*args, **kwargs)

    def _bind(
        self, step: Call, values: MutableMapping[int, Any], program: Program, tile: Tile | None
    ) -> tuple[list[Any], dict[str, Any]]:
        callee: Callee = self._callees[step.target]
        method = callee.method
        args = [self._argument(a, values, program, method.identifier) for a in step.args]
        kwargs = {n: self._argument(a, values, program, method.identifier) for n, a in step.kwargs}
        if method.declaration.accepts_context:
            key = program.name(step.key)
            kwargs["key"] = key
            kwargs["key_relation"] = relation_of(step, program) or identity_relation(method, key)
            kwargs["cache"] = callee.cache
            kwargs["output_reused"] = step.reused
            if tile is not None and method.tiling in ("elementwise", "rows", "pieces"):
                kwargs["tile"] = tile
        return args, kwargs

    def named(self, step: Call, program: Program) -> _Named:
        """A context in which exceptions of a method say which method it is, and at which key."""
        return _Named(step, program, self.method_name(step))

    def makes_pieces(self, step: Call) -> bool:
        """Whether the method of a call makes its result in pieces where it can."""
        return bool(self._callees[step.target].method.tiling == "pieces")

    def method(self, step: Call) -> MergeMethod:
        found: MergeMethod = self._callees[step.target].method
        return found

    def method_name(self, step: Call) -> str:
        return str(self._callees[step.target].method.identifier)

    def unpack(self, step: Call, result: Any, program: Program, specs: Any) -> list[Any]:
        """The values of a whole-tensor call, one for each of its slots.

        Raises:
            ContractError: keys or shapes are not those that the method declares.
        """
        name = self.method_name(step)
        relation = relation_of(step, program)
        if relation is not None and isinstance(result, Mapping):
            outputs = relation.outputs
            if absent := [k for k in outputs if k not in result]:
                raise ContractError(f"{name} did not return key {absent[0]!r}, which its key map declares")
            if self._validate and (extra := sorted(result.keys() - set(outputs))):
                raise ContractError(f"{name} returned key {extra[0]!r}, which its key map does not declare")
            values = [result[k] for k in outputs]
        else:
            values = [result] * len(step.slots)
        for slot, value in zip(step.slots, values, strict=True):
            spec = specs[slot]
            if isinstance(spec, TensorEntry):
                if not isinstance(value, Tensor):
                    raise ContractError(f"{name} returned a {type(value).__name__}, expected a tensor")
                if tuple(value.shape) != spec.shape:
                    how = "its first input has" if step.assumed else "it returns on the meta device"
                    raise ContractError(
                        f"{name} returned shape {tuple(value.shape)} at key {program.name(step.key)!r}, "
                        f"expected {spec.shape}, as {how}"
                    )
        return values

    def _instance(self, target: int) -> Callable[..., Any]:
        instance = self._instances.get(target)
        if instance is None:
            # setdefault is atomic: two workers that come here together end up with the same instance
            instance = self._instances.setdefault(target, self._callees[target].method.instantiate())
        return instance

    @staticmethod
    def _argument(arg: Arg, values: MutableMapping[int, Any], program: Program, method: str) -> Any:
        if arg.by_key is not None:
            return _LazyValues({program.name(k): values[s] for k, s in arg.by_key}, arg, method)
        value = values[arg.slot]
        return value if arg.convert is None else as_type(value, arg.convert)


def relation_of(step: Call, program: Program) -> RealizedKeyRelation | None:
    """The relation that a call realises; in a template that keys share it makes the program's key of that same key."""
    relation = step.relation
    if isinstance(relation, int):
        return program.relations[relation]
    if relation is None or step.key is not None:
        return relation
    key = program.name(None)
    inputs = {param: (key,) if keys else () for param, keys in relation.inputs.items()}
    return RealizedKeyRelation((key,), inputs, relation.meta)


def skipped(step: Call, program: Program, method: str) -> Missing:
    """What a method means that raises StateDictKeyError."""
    relation = relation_of(step, program)
    keys = (program.name(step.key),) if relation is None else relation.outputs
    return Missing(step.origin, keys, f"{method} skips what it is asked for", deliberate=True)


def explain_failure(error: BaseException, text: str) -> None:
    """Say where an exception of somebody else's code came from, without changing its type."""
    notes = getattr(error, "__notes__", [])
    if text not in notes:
        error.__notes__ = [*notes, text]  # type: ignore[attr-defined]  # what add_note does from Python 3.11 on
