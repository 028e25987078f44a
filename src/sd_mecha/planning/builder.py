"""From a recipe at a key to a template: slots, steps, shapes and dtypes, before a byte is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from sd_mecha.errors import RecipeTypeError, ShapeError, StateDictKeyError
from sd_mecha.extensions.method import method_of
from sd_mecha.extensions.parameters import ParameterData, type_name
from sd_mecha.planning import integers
from sd_mecha.planning.arguments import PlannedCall, convert_constant, scalar_dtype
from sd_mecha.planning.bench import Workbench
from sd_mecha.planning.keys import Source
from sd_mecha.planning.program import Arg, Call, Load, Name, Output, Step, Template
from sd_mecha.planning.results import Parameter, infer
from sd_mecha.planning.shapes import Result, Spec, computes
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import FLOAT4, dtype_name

Instance = Source
_NUMBERS = (int, float, bool)


class Builder:
    """Builds one template. With `shared_key`, names equal to it are left out, so that other keys can use it too."""

    def __init__(self, bench: Workbench, shared_key: str | None = None) -> None:
        self.bench = bench
        self.shared_key = shared_key
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.specs: list[Spec] = []
        self._tokens: list[object] = []  # equal for slots that calls cannot tell apart while planning
        self.outputs: list[Output] = []
        self.producer: dict[int, Step] = {}
        self.target = bench.targets[0]
        self._slots: dict[Instance, int] = {}
        self._slots_of: dict[int, dict[Instance, int]] = {}
        self._known: dict[object, tuple[int, ...]] = {}  # equal steps are taken once, also across targets
        self._converted: dict[tuple[int, object], int] = {}
        self._cast: dict[int, int] = {}  # a tensor as it is stored -> the same one cast, where that loses nothing

    # --- results ---------------------------------------------------------------------------------------------------

    def add_output(self, target: int, key: str) -> None:
        """Let the value of a target's root at `key` be written."""
        self.look_at(target)
        if key in self.target.facts.carried:
            slot = self._carried(key)
            self.outputs.append(Output(slot, target, self.name(key), self._entry(slot)))
            return
        slot = self._value((self.target.root, key))
        precision, casts = self.bench.precision, self._casts(slot)
        loads = [x for x in self.loads_below([slot]) if isinstance(self.bench.nodes[x.origin], ModelRecipeNode)]
        if integers.copied(loads, key, precision.merge_dtype, casts):
            slot = self._keep_first(loads)
            entry = self._entry(slot)
        else:
            slot = self._lossless_copy(slot)
            entry = self._entry(slot)
            entry = TensorEntry(entry.shape, integers.output_dtype(entry.dtype, precision, loads, casts))
        self.outputs.append(Output(slot, target, self.name(key), entry))

    def _carried(self, key: str) -> int:
        node = self.target.facts.carried[key]
        reader = self.bench.models.index[node]
        stored = self.bench.models.readers[reader].entries[key]
        return self._load(reader, self.name(key), stored, stored.dtype, self.bench.origin(node), False)

    def _casts(self, slot: int) -> bool:
        """Whether the recipe itself decides on the dtype of a value."""
        callees = (self.bench.callables[s.target].method for s in self._below([slot]) if isinstance(s, Call))
        return any(method.identifier == "cast" for method in callees)

    def finish(self) -> Template:
        """The template, without steps that no output needs."""
        calls = [step for step in self._below(o.slot for o in self.outputs) if isinstance(step, Call)]
        computed = {slot for call in calls for slot in call.inputs}
        # a tensor that is read for a computation anyway is not read once more to be copied
        outputs = [
            replace(o, slot=self._cast[o.slot]) if self._cast.get(o.slot) in computed else o for o in self.outputs
        ]
        kept = self._below(o.slot for o in outputs)
        uses = Counter(slot for step in kept if isinstance(step, Call) for slot in step.inputs)
        uses.update(o.slot for o in outputs)
        return Template(
            tuple(_reused(step, uses) for step in kept),
            {s: v for s, v in self.constants.items() if s in uses},
            tuple(self.specs),
            tuple(outputs),
        )

    def look_at(self, target: int) -> None:
        """Take the facts of that target from now on."""
        self.target = self.bench.targets[target]
        self._slots = self._slots_of.setdefault(target, {})

    def name(self, key: str) -> str | None:
        return None if key == self.shared_key else key

    def loads_below(self, slots: Iterable[int]) -> list[Load]:
        """The loads that some slots are made from, in order of their steps."""
        return [step for step in self._below(slots) if isinstance(step, Load)]

    def _below(self, slots: Iterable[int]) -> list[Step]:
        """The steps that some slots are made by, in their order."""
        found: dict[int, Step] = {}  # by first slot, which numbers them
        stack = list(slots)
        while stack:
            step = self.producer.get(stack.pop())
            if step is None:
                continue
            first = step.slot if isinstance(step, Load) else step.slots[0]
            if first not in found:
                found[first] = step
                if isinstance(step, Call):
                    stack.extend(step.inputs)
        return [found[s] for s in sorted(found)]

    def _entry(self, slot: int) -> TensorEntry:
        spec = self.specs[slot]
        if isinstance(spec, TensorEntry):
            return spec
        if spec in (int, float, bool):
            return TensorEntry((), self.bench.precision.merge_dtype or torch.float32)
        raise RecipeTypeError(f"the recipe makes a {spec.__name__}, which cannot be written; expected a tensor")

    def _keep_first(self, loads: Sequence[Load]) -> int:
        raw = [self._load(step.reader, step.name, step.stored, step.stored.dtype, step.origin, False) for step in loads]
        if len(raw) == 1:
            return raw[0]
        args = tuple(Arg(slot) for slot in raw)
        slot = self._slot(loads[0].stored)
        target = self.bench.callee(integers.keep_first)
        why = "not weights: copied bit for bit from the first input"
        self._add(Call((slot,), target, args, (), tuple(raw), None, False, True, why))
        return slot

    def _lossless_copy(self, slot: int) -> int:
        """A tensor that is only copied need not be cast to the merge dtype on its way, where that changes nothing."""
        step = self.producer.get(slot)
        if not isinstance(step, Load):
            return slot
        stored, wide = step.stored.dtype, step.dtype
        if stored.is_floating_point and wide.is_floating_point and widens(stored, wide):
            narrow = self._load(step.reader, step.name, step.stored, stored, step.origin, step.guard)
            if narrow != slot:
                self._cast[narrow] = slot
            return narrow
        return slot

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _value(self, root: Instance) -> int:
        slots = self._slots
        stack = [root]
        while stack:
            instance = stack[-1]
            if instance in slots:
                stack.pop()
                continue
            pending = [n for n in self.needs(instance) if n not in slots]
            if pending:
                stack.extend(reversed(pending))
            else:
                stack.pop()
                self._emit(instance)
        return slots[root]

    def needs(self, instance: Instance) -> list[Source]:
        """The (node, key) pairs that a node at a key is made from."""
        node, key = instance
        if isinstance(node, MergeRecipeNode):
            facts = self.target.facts
            if node in facts.chosen:
                source = facts.chosen[node](key)
                assert source is not None
                return [source]
            if node not in facts.realized:
                return [(child, key) for child in node.children]
            return [s for _, _, sources in self._parameters(node, key) for s in sources]
        if isinstance(node, LiteralRecipeNode):
            value = node.value_dict[key]
            return [(value, key)] if isinstance(value, RecipeNode) else []
        return []

    def _emit(self, instance: Instance) -> None:
        node, key = instance
        if isinstance(node, ModelRecipeNode):
            stored_as = self.target.facts.stored.get(node, {}).get(key, key)
            reader = self.bench.models.index[node]
            if stored_as not in self.bench.models.readers[reader].entries:
                reader = self.target.facts.created[node]
            self._slots[instance] = self._model(node, reader, stored_as, True)
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

    def _parameters(self, node: MergeRecipeNode, key: str) -> list[tuple[str, ParameterData, list[Source]]]:
        """Each argument with the (input, key) pairs it stands for at `key`."""
        bound = self.bench.bound(node)
        realized = self.target.facts.realized.get(node)
        if realized is None:
            return [(name, data, [(child, key)]) for name, data, child in bound]
        inputs = realized[key].inputs
        out: list[tuple[str, ParameterData, list[Source]]] = []
        for name, data, child in bound:
            keys: Sequence[str] = inputs.get(name, ())
            if not keys and not data.is_state_dict:  # a plain parameter that the key map does not mention
                available = self.target.facts.available[child]
                keys = (key,) if key in available else sorted(available)[:1]
            out.append((name, data, [(child, k) for k in keys]))
        return out

    # --- steps -----------------------------------------------------------------------------------------------------

    def _slot(self, spec: Spec, token: object = None) -> int:
        self.specs.append(spec)
        self._tokens.append(spec if token is None else token)
        return len(self.specs) - 1

    def _constant(self, value: Any) -> int:
        if isinstance(value, torch.Tensor):
            slot = self._slot(TensorEntry(tuple(value.shape), value.dtype))
        else:
            slot = self._slot(type(value), (type(value), repr(value)))
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

    def _load(self, reader: int, name: Name, stored: TensorEntry, dtype: torch.dtype, origin: int, guard: bool) -> int:
        token = (reader, name, dtype, guard)
        if stored.dtype is FLOAT4:  # of a literal
            raise RecipeTypeError(f"key {name or self.shared_key!r}: it is {dtype_name(FLOAT4)}; give it as floats")
        if token not in self._known:
            slot = self._slot(TensorEntry(stored.shape, dtype))
            self._add(Load(slot, reader, name, stored, dtype, origin, guard))
            self._known[token] = (slot,)
        return self._known[token][0]

    def _call(self, node: MergeRecipeNode, key: str) -> None:
        method = method_of(node)
        realized = self.target.facts.realized.get(node)
        relation = None if realized is None else realized[key]
        outputs = (key,) if relation is None else relation.outputs
        parameters = self._parameters(node, key)
        args = []
        for name, data, sources in parameters:
            try:
                arg = self._arg(data, sources)
                if sources and self.constants.get(arg.slot, 0) is None and not method.takes_none(name):
                    raise RecipeTypeError(f"it is None; expected a {type_name(data.value_type)}")
                args.append(arg)
            except RecipeTypeError as error:
                raise RecipeTypeError(f"key {key!r}: {method.identifier}: {name}: {error}") from error
        positional = tuple(args[: len(node.args)])
        named = tuple(zip(node.kwargs, args[len(node.args) :], strict=True))
        token = (node, positional, named, key) if len(self.bench.targets) > 1 else None
        if token is not None and token in self._known:
            self._slots.update(zip(((node, out) for out in outputs), self._known[token], strict=True))
            return
        inputs = tuple([s for a in args for s in a.slots])
        memo = (method, *[self._tokens[s] for s in inputs]) if relation is None else None
        result = self.bench.results.get(memo)
        if result is None:
            device = self.bench.precision.merge_device or torch.device("cpu")
            call = PlannedCall(
                method, positional, dict(named), self.specs, self.constants, device, key, relation,
                self.target.configs[node], self.bench.instance(node),
            )  # fmt: skip
            try:
                if call.is_constant:
                    self._slots[node, key] = self._constant(call.run())
                    return
                result = self._result(node, call, outputs, [(name, data) for name, data, _ in parameters])
                if memo is not None:
                    self.bench.results[memo] = result
            except StateDictKeyError:  # these keys will be planned without; something must stand here until then
                self.bench.skipped.update((node, out) for out in outputs)
                result = Result((call.first_tensor or TensorEntry((), torch.float32),) * len(outputs), False, "")
        slots = tuple([self._slot(spec) for spec in result.specs])
        self._add(
            Call(
                slots,
                self.bench.callee(method, node),
                positional,
                named,
                inputs,
                relation,
                method.reuse_outputs,
                result.tiled,
                result.why,
                self.name(outputs[0]),
                result.assumed,
                self.bench.origin(node),
            )
        )
        if token is not None:
            self._known[token] = slots
        for out, slot in zip(outputs, slots, strict=True):
            self._slots[node, out] = slot

    def _arg(self, data: ParameterData, sources: Sequence[Source]) -> Arg:
        if data.is_state_dict:
            config = self.target.configs[sources[0][0]] if sources else None
            typed = [self._typed(self._slots[source], data.value_type) for source in sources]
            pairs = tuple([(self.name(key), slot) for (_, key), (slot, _) in zip(sources, typed, strict=True)])
            return Arg(-1, next((c for _, c in typed if c is not None), None), pairs, config)
        if not sources:
            return Arg(self._constant(None))
        return Arg(*self._typed(self._slots[sources[0]], data.interface))

    def _typed(self, slot: int, wanted: Any) -> tuple[int, type | torch.dtype | None]:
        """A slot as the declared type: constants are converted now, computed values when the call runs.

        Raises:
            RecipeTypeError: the value cannot be had as that type.
        """
        if slot in self.constants:
            token = (slot, wanted)
            if token not in self._converted:
                value = convert_constant(self.constants[slot], wanted, self.bench.precision.merge_dtype)
                self._converted[token] = slot if value is self.constants[slot] else self._constant(value)
            return self._converted[token], None
        spec = self.specs[slot]
        if spec is wanted or isinstance(wanted, TypeVar) or (wanted is torch.Tensor and isinstance(spec, TensorEntry)):
            return slot, None
        if isinstance(spec, TensorEntry):
            if wanted in _NUMBERS and spec.numel == 1:
                return slot, wanted
            raise RecipeTypeError(f"a tensor of shape {spec.shape} cannot be used as {wanted.__name__}")
        if spec in _NUMBERS and wanted is not str:
            return slot, scalar_dtype(self.bench.precision.merge_dtype) if wanted is torch.Tensor else wanted
        raise RecipeTypeError(f"a computed {spec.__name__} cannot be used as {wanted.__name__}")

    def _result(
        self, node: MergeRecipeNode, call: PlannedCall, outputs: tuple[str, ...], parameters: Sequence[Parameter]
    ) -> Result:
        try:
            return infer(call, outputs, parameters)
        except ShapeError as error:
            self.bench.problems[self._shape_problem(node, call, parameters, error)] = None
            first = call.first_tensor
            assert first is not None
            return Result((first,) * len(outputs), False, "")

    def _shape_problem(
        self, node: MergeRecipeNode, call: PlannedCall, parameters: Sequence[Parameter], error: ShapeError
    ) -> str:
        shown = []
        for arg, (name, _) in zip((*call.args, *call.kwargs.values()), parameters, strict=True):
            for slot in arg.slots[:1]:
                entry = self.specs[slot]
                if isinstance(entry, TensorEntry) and slot not in self.constants:
                    origins = {self.bench.models.readers[load.reader].name: None for load in self.loads_below([slot])}
                    files = ", ".join(origins) or "a literal"
                    shown.append(f"{name} of shape {entry.shape} (from {files})")
        where = "" if node == self.target.root else f" (at {self.bench.path_to(self.target.root, node)})"
        return f"key {call.key!r}: {call.method.identifier} cannot combine {' and '.join(shown)}: {error}{where}"


def _reused(step: Step, uses: Counter[int]) -> Step:
    """A step that knows whether its result has another consumer."""
    if isinstance(step, Load) or not step.reused or any(uses[slot] > 1 for slot in step.slots):
        return step
    return step._replace(reused=False)


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of one float dtype is exact in the other."""
    a, b = torch.finfo(narrow), torch.finfo(wide)
    return a.eps >= b.eps and a.max <= b.max and a.smallest_normal * a.eps >= b.smallest_normal * b.eps
