"""Templates that keys share whose sources have other names.

A recipe that renames keys is built anew for each of them, but most of what is built is the same: a network has many
layers of each kind. What differs, names and relations of keys, is taken out into the program; templates that are then
equal are kept once. Without that a plan of many adapters would outgrow what running it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from sd_mecha.extensions.key_map import RealizedKeyRelation
from sd_mecha.planning.program import Arg, Load, Name, Program, Step, Template


class SharedTemplates:
    """Makes programs of templates that name their keys, and keeps equal templates once.

    Args:
        complete: fills in the stages of a template that is new.
    """

    def __init__(self, complete: Callable[[Template], None]) -> None:
        self._complete = complete
        self._known: dict[object, Template] = {}

    def program(self, template: Template, key: str) -> Program:
        """A template at a key."""
        names: dict[str, int] = {}
        relations: dict[int, tuple[int, RealizedKeyRelation]] = {}

        def named(name: Name) -> Name:
            return names.setdefault(name, len(names)) if isinstance(name, str) else name

        def argument(arg: Arg) -> Arg:
            if arg.by_key is None:
                return arg
            return arg._replace(by_key=tuple([(named(name), slot) for name, slot in arg.by_key]))

        def step_of(step: Step) -> Step:
            if isinstance(step, Load):
                return step._replace(name=named(step.name))
            relation: Any = step.relation
            if isinstance(relation, RealizedKeyRelation):
                relation, _ = relations.setdefault(id(relation), (len(relations), relation))
            args = tuple([argument(arg) for arg in step.args])
            kwargs = tuple([(name, argument(arg)) for name, arg in step.kwargs])
            return step._replace(args=args, kwargs=kwargs, relation=relation, key=named(step.key))

        steps = tuple([step_of(step) for step in template.steps])
        outputs = tuple([replace(output, name=named(output.name)) for output in template.outputs])
        constants = tuple([(slot, _token(value)) for slot, value in template.constants.items()])
        token = steps, outputs, constants, template.specs
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = Template(steps, template.constants, template.specs, outputs)
            self._complete(found)
        return Program(found, key, tuple(names), tuple(relation for _, relation in relations.values()))


def _token(value: Any) -> object:
    """What is equal for constants that are the same; for larger tensors that is not looked for."""
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    if value.dim() or value.device.type != "cpu":
        return object()
    return value.dtype, repr(value.item())
