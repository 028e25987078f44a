"""From a recipe at a key to a template: slots, steps, shapes and dtypes, before a byte is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sd_mecha.errors import RecipeTypeError, ShapeError
from sd_mecha.extensions.key_map import RealizedKeyRelation
from sd_mecha.extensions.merge_methods import MergeMethod, ParameterData
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.planning import integers
from sd_mecha.planning.arguments import PlannedCall, convert_constant
from sd_mecha.planning.keys import KeyFacts, Source, identity_relation
from sd_mecha.planning.opening import OpenModels
from sd_mecha.planning.program import Arg, Call, Callee, Load, Output, Step, Template
from sd_mecha.planning.shapes import Inferred, Spec, computes, infer
from sd_mecha.planning.tiling import decide
from sd_mecha.planning.trail import describe, named_children
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.memory import MemoryReader


@dataclass(frozen=True)
class Precision:
    """Devices and dtypes of a merge; None leaves what is there."""

    merge_device: torch.device | None
    merge_dtype: torch.dtype | None
    output_dtype: torch.dtype | None
    guard: bool  # omit_non_finite_inputs


@dataclass(frozen=True)
class Target:
    """One of the recipes that are merged together, analysed."""

    root: RecipeNode
    configs: Mapping[RecipeNode, ModelConfig]
    facts: KeyFacts


@dataclass
class Workbench:
    """What all templates of a plan share."""

    models: OpenModels
    targets: Sequence[Target]
    precision: Precision
    caches: Mapping[RecipeNode, Any]
    nodes: list[RecipeNode] = field(default_factory=list)
    callables: list[Callee] = field(default_factory=list)
    inferred: dict[object, Inferred] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)
    origins: dict[RecipeNode, int] = field(default_factory=dict)
    called: dict[object, int] = field(default_factory=dict)

    def origin(self, node: RecipeNode) -> int:
        if node not in self.origins:
            self.origins[node] = len(self.nodes)
            self.nodes.append(node)
        return self.origins[node]

    def callee(self, method: MergeMethod, node: RecipeNode | None = None) -> int:
        token: object = method if node is None else node
        if token not in self.called:
            self.called[token] = len(self.callables)
            cache = None if node is None else self.caches.get(node)
            self.callables.append(Callee(method, cache))
        return self.called[token]

    def literal_reader(self, node: LiteralRecipeNode) -> int:
        """The tensors of a literal, as one more model."""
        if node not in self.models.index:
            tensors = {k: v for k, v in node.value_dict.items() if isinstance(v, torch.Tensor)}
            self.models.index[node] = len(self.models.readers)
            self.models.readers.append(MemoryReader(tensors, describe(node)))
        return self.models.index[node]


Instance = tuple[RecipeNode, str]


class Builder:
    """Builds one template. With `shared_key`, names equal to it are left out, so that other keys can use it too."""

    def __init__(self, bench: Workbench, shared_key: str | None = None) -> None:
        self.bench = bench
        self.shared_key = shared_key
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.specs: list[Spec] = []
        self.outputs: list[Output] = []
        self.producer: dict[int, Step] = {}
        self.target = bench.targets[0]
        self._slots: dict[Instance, int] = {}
        self._slots_of: dict[int, dict[Instance, int]] = {}
        self._known: dict[object, tuple[int, ...]] = {}  # equal steps are taken once, also across targets
        self._converted: dict[tuple[int, object], int] = {}

    # --- results ---------------------------------------------------------------------------------------------------

    def add_output(self, target: int, key: str) -> None:
        """Let the value of a target's root at `key` be written."""
        self.look_at(target)
        slot = self._value((self.target.root, key))
        loads = self.loads_below([slot])
        if integers.copied(loads, self, key):
            slot = self._keep_first(loads, key)
            entry = self._entry(slot)
        else:
            slot = self._lossless_copy(slot)
            entry = self._entry(slot)
            entry = TensorEntry(entry.shape, integers.output_dtype(entry.dtype, self.bench.precision, loads, self))
        self.outputs.append(Output(slot, target, self.name(key), entry))

    def finish(self) -> Template:
        """The template, without steps that no output needs."""
        needed = {o.slot for o in self.outputs}
        kept: list[Step] = []
        for step in reversed(self.steps):
            slots = (step.slot,) if isinstance(step, Load) else step.slots
            if needed.isdisjoint(slots):
                continue
            kept.append(step)
            if isinstance(step, Call):
                needed.update(step.inputs)
        kept.reverse()
        return Template(
            tuple(kept),
            {s: v for s, v in self.constants.items() if s in needed},
            tuple(self.specs),
            tuple(self.outputs),
        )

    def look_at(self, target: int) -> None:
        """Take the facts of that target from now on."""
        self.target = self.bench.targets[target]
        self._slots = self._slots_of.setdefault(target, {})

    def name(self, key: str) -> str | None:
        return None if key == self.shared_key else key

    def loads_below(self, slots: Iterable[int]) -> list[Load]:
        """The loads that some slots are made from, in order of their steps."""
        found: dict[int, Load] = {}
        stack, seen = list(slots), set()
        while stack:
            slot = stack.pop()
            step = self.producer.get(slot)
            if slot in seen or step is None:
                continue
            seen.add(slot)
            if isinstance(step, Load):
                found[slot] = step
            else:
                stack.extend(step.inputs)
        return [found[s] for s in sorted(found)]

    def _entry(self, slot: int) -> TensorEntry:
        spec = self.specs[slot]
        if isinstance(spec, TensorEntry):
            return spec
        if spec in (int, float, bool):
            return TensorEntry((), self.bench.precision.merge_dtype or torch.float32)
        raise RecipeTypeError(f"the recipe makes a {spec.__name__}, which cannot be written; expected a tensor")

    def _keep_first(self, loads: Sequence[Load], key: str) -> int:
        raw = [self._load(step.reader, step.name, step.stored, step.stored.dtype, step.origin, False) for step in loads]
        if len(raw) == 1:
            return raw[0]
        args = tuple(Arg(slot) for slot in raw)
        slot = self._slot(loads[0].stored)
        target = self.bench.callee(integers.keep_first)
        why = "not weights: copied bit for bit from the first input"
        self._add(Call((slot,), target, args, (), None, False, True, why))
        return slot

    def _lossless_copy(self, slot: int) -> int:
        """A tensor that is only copied need not be cast to the merge dtype on its way, where that changes nothing."""
        step = self.producer.get(slot)
        if not isinstance(step, Load):
            return slot
        stored, wide = step.stored.dtype, step.dtype
        if stored.is_floating_point and wide.is_floating_point and widens(stored, wide):
            return self._load(step.reader, step.name, step.stored, stored, step.origin, step.guard)
        return slot

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _value(self, root: Instance) -> int:
        stack = [root]
        while stack:
            instance = stack[-1]
            if instance in self._slots:
                stack.pop()
                continue
            needs = self.needs(instance)
            pending = [n for n in needs if n not in self._slots]
            if pending:
                stack.extend(reversed(pending))
            else:
                stack.pop()
                self._emit(instance)
        return self._slots[root]

    def needs(self, instance: Instance) -> list[Source]:
        node, key = instance
        if isinstance(node, LiteralRecipeNode):
            value = node.value_dict[key]
            return [(value, key)] if isinstance(value, RecipeNode) else []
        if isinstance(node, MergeRecipeNode):
            if node in self.target.facts.chosen:
                source = self.target.facts.chosen[node](key)
                assert source is not None
                return [source]
            return [s for _, _, sources in self._parameters(node, key) for s in sources]
        return []

    def _emit(self, instance: Instance) -> None:
        node, key = instance
        if isinstance(node, ModelRecipeNode):
            stored_as = self.target.facts.stored.get(node, {}).get(key, key)
            self._slots[instance] = self._model(node, self.bench.models.index[node], stored_as, True)
        elif isinstance(node, LiteralRecipeNode):
            value = node.value_dict[key]
            if isinstance(value, RecipeNode):
                self._slots[instance] = self._slots[value, key]
            elif isinstance(value, torch.Tensor):
                self._slots[instance] = self._model(node, self.bench.literal_reader(node), key, False)
            else:
                self._slots[instance] = self._constant(value)
        elif node in self.target.facts.chosen:
            self._slots[instance] = self._slots[self.needs(instance)[0]]
        else:
            assert isinstance(node, MergeRecipeNode)
            self._call(node, key)

    def _relation(self, node: MergeRecipeNode, key: str) -> RealizedKeyRelation | None:
        realized = self.target.facts.realized.get(node)
        return None if realized is None else realized[key]

    def _parameters(self, node: MergeRecipeNode, key: str) -> list[tuple[str, ParameterData, list[Source]]]:
        """Each argument with the (input, key) pairs it stands for at `key`."""
        method: MergeMethod = node.merge_method  # type: ignore[assignment]
        data = method.declaration.parameters
        declared = [*data.args_varargs(len(node.args)), *(data.kwargs[name] for name in node.kwargs)]
        relation = self._relation(node, key)
        out: list[tuple[str, ParameterData, list[Source]]] = []
        for d, (name, child) in zip(declared, named_children(node), strict=True):
            keys: Sequence[str] = (key,) if relation is None else relation.inputs.get(name, ())
            if not keys and not d.is_state_dict:  # a plain parameter that the key map does not mention
                available = self.target.facts.available[child]
                keys = (key,) if key in available else sorted(available)[:1]
            out.append((name, d, [(child, k) for k in keys]))
        return out

    # --- steps -----------------------------------------------------------------------------------------------------

    def _slot(self, spec: Spec) -> int:
        self.specs.append(spec)
        return len(self.specs) - 1

    def _constant(self, value: Any) -> int:
        spec = TensorEntry(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)
        slot = self._slot(spec)
        self.constants[slot] = value
        return slot

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        for slot in (step.slot,) if isinstance(step, Load) else step.slots:
            self.producer[slot] = step

    def _model(self, node: RecipeNode, reader: int, name: str, guard: bool) -> int:
        stored = self.bench.models.readers[reader].entries[name]
        wanted = self.bench.precision.merge_dtype
        dtype = computes(stored.dtype) if wanted is None or stored.dtype.is_complex else wanted
        guard = guard and self.bench.precision.guard and (stored.dtype.is_floating_point or stored.dtype.is_complex)
        return self._load(reader, self.name(name), stored, dtype, self.bench.origin(node), guard)

    def _load(
        self, reader: int, name: str | None, stored: TensorEntry, dtype: torch.dtype, origin: int, guard: bool
    ) -> int:
        token = (reader, name, dtype, guard)
        if token not in self._known:
            slot = self._slot(TensorEntry(stored.shape, dtype))
            self._add(Load(slot, reader, name, stored, dtype, origin, guard))
            self._known[token] = (slot,)
        return self._known[token][0]

    def _call(self, node: MergeRecipeNode, key: str) -> None:
        method: MergeMethod = node.merge_method  # type: ignore[assignment]
        relation = self._relation(node, key)
        outputs = (key,) if relation is None else relation.outputs
        parameters = self._parameters(node, key)
        args = [self._arg(data, sources) for _, data, sources in parameters]
        positional = tuple(args[: len(node.args)])
        named = tuple(zip(node.kwargs, args[len(node.args) :], strict=True))
        token = (node, positional, named, key)
        if token in self._known:
            self._slots.update(zip(((node, out) for out in outputs), self._known[token], strict=True))
            return
        call = self._planned(method, positional, dict(named), key, relation)
        if call.is_constant:
            self._slots[node, key] = self._constant(call.run())
            return
        names = [name for name, _, _ in parameters]
        inferred = self._infer(method, call, outputs, relation, names, args, key)
        slots = tuple(self._slot(spec) for spec in inferred.specs)
        tiled, why = decide(method, positional, dict(named), slots, self.specs, self.constants, inferred.assumed)
        self._add(
            Call(
                slots,
                self.bench.callee(method, node),
                positional,
                named,
                relation,
                method.reuse_outputs,
                tiled,
                why,
                self.name(outputs[0]),
                inferred.assumed,
                self.bench.origin(node),
            )
        )
        self._known[token] = slots
        self._slots.update(zip(((node, out) for out in outputs), slots, strict=True))

    def _planned(
        self,
        method: MergeMethod,
        args: tuple[Arg, ...],
        kwargs: Mapping[str, Arg],
        key: str,
        relation: RealizedKeyRelation | None,
    ) -> PlannedCall:
        device = self.bench.precision.merge_device or torch.device("cpu")
        context = identity_relation(method, key) if relation is None else relation
        return PlannedCall(method, args, kwargs, self.specs, self.constants, device, key, context)

    def _arg(self, data: ParameterData, sources: Sequence[Source]) -> Arg:
        if data.is_state_dict:
            config = self.target.configs[sources[0][0]] if sources else None
            pairs = tuple((self.name(k), self._typed(self._slots[n, k], data.value_type)[0]) for n, k in sources)
            return Arg(by_key=pairs, config=config)
        if not sources:
            return Arg(self._constant(None))
        slot, convert = self._typed(self._slots[sources[0]], data.value_type)
        return Arg(slot, convert)

    def _typed(self, slot: int, wanted: Any) -> tuple[int, type | None]:
        """A slot as the declared type: constants are converted now, tensors to Python numbers when the call runs."""
        if slot in self.constants:
            token = (slot, wanted)
            if token not in self._converted:
                value = convert_constant(self.constants[slot], wanted, self.bench.precision.merge_dtype)
                self._converted[token] = slot if value is self.constants[slot] else self._constant(value)
            return self._converted[token], None
        if isinstance(self.specs[slot], TensorEntry) and wanted in (int, float, bool):
            return slot, wanted
        return slot, None

    def _infer(
        self,
        method: MergeMethod,
        call: PlannedCall,
        outputs: tuple[str, ...],
        relation: RealizedKeyRelation | None,
        names: Sequence[str],
        args: Sequence[Arg],
        key: str,
    ) -> Inferred:
        memo = None if relation is not None else (method, call.token)
        if memo is not None and memo in self.bench.inferred:
            return self.bench.inferred[memo]
        first = next((self.specs[s] for a in args for s in a.slots if isinstance(self.specs[s], TensorEntry)), None)
        try:
            if method.tiling == "elementwise":
                self._check_same_shape(method, args, names, key)
            inferred = infer(call.on_meta, outputs, first)
        except ShapeError as error:
            self.bench.problems[self._shape_problem(method, args, names, key, error)] = None
            assert first is not None
            return Inferred((first,) * len(outputs))
        if memo is not None:
            self.bench.inferred[memo] = inferred
        return inferred

    def _check_same_shape(self, method: MergeMethod, args: Sequence[Arg], names: Sequence[str], key: str) -> None:
        shapes = set()
        for arg, name in zip(args, names, strict=True):
            data = _parameter(method, name)
            entry = self.specs[arg.slots[0]] if arg.slots else None
            if isinstance(entry, TensorEntry) and not _is_param(data):
                shapes.add(entry.shape)
        if len(shapes) > 1:
            raise ShapeError("the shapes differ")

    def _shape_problem(
        self, method: MergeMethod, args: Sequence[Arg], names: Sequence[str], key: str, error: ShapeError
    ) -> str:
        shown = []
        for arg, name in zip(args, names, strict=True):
            for slot in arg.slots[:1]:
                entry = self.specs[slot]
                if isinstance(entry, TensorEntry) and slot not in self.constants:
                    origins = {self.bench.models.readers[load.reader].name: None for load in self.loads_below([slot])}
                    files = ", ".join(origins) or "a literal"
                    shown.append(f"{name} of shape {tuple(entry.shape)} (from {files})")
        return f"key {key!r}: {method.identifier} cannot combine {' and '.join(shown)}: {error}"


def _parameter(method: MergeMethod, name: str) -> ParameterData:
    return next(data for n, data in method.declaration if n == name)


def _is_param(data: ParameterData) -> bool:
    spaces = data.merge_space
    return isinstance(spaces, frozenset) and all(s.identifier == "param" for s in spaces)


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of one float dtype is exact in the other."""
    a, b = torch.finfo(narrow), torch.finfo(wide)
    return a.eps >= b.eps and a.max <= b.max and a.smallest_normal * a.eps >= b.smallest_normal * b.eps
