"""The layouts of a model as an adapter may name them: what each of their tensors is in the model's own layout.

An adapter names modules of the layout that it was trained in, which need not be that of the model that it is applied
to. Every layout that conversions lead to from the model's is looked at, whether they follow from rules or are written
as merge methods.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sd_mecha.extensions import merge_methods, model_configs, translations
from sd_mecha.extensions.key_map import RealizedKeyRelation, build_key_map
from sd_mecha.extensions.layouts import Link, Part, Shape
from sd_mecha.extensions.merge_methods import MergeMethod, StateDict
from sd_mecha.extensions.model_configs import ModelConfig

LONGEST_CHAIN = 2
"""Conversions one after the other: from one program's layout to the original, and to that of another program."""


def layouts_of(config: ModelConfig) -> Iterator[tuple[ModelConfig, Mapping[str, Link]]]:
    """Yield the layouts of a model, its own first, each with what its tensors are made of in the model's own."""
    found: dict[str, Mapping[str, Link]] = {config.identifier: own_links(config)}
    yield config, found[config.identifier]
    step = [(config, False)]
    for _ in range(LONGEST_CHAIN):
        following = []
        for here, is_part in step:
            for name, method in merge_methods.get_conversions_from(here.identifier):
                if name in found or not _is_of_layouts(method):
                    continue
                there = model_configs.resolve(name)
                before, after = here.components().keys(), there.components().keys()
                if is_part and before < after:
                    continue  # another model with the same part
                found[name] = _chained(found[here.identifier], _links(here, there, method))
                following.append((there, is_part or after < before))
                yield there, found[name]
        step = following


def own_links(config: ModelConfig) -> dict[str, Link]:
    """Each key of known shape as what it is itself."""
    shapes = _shapes(config)
    return {key: Link(key, (Part(key, 0, rows_of(shape)),), shape) for key, shape in shapes.items()}


def rows_of(shape: Shape) -> int:
    """How many rows links count in a tensor of that shape; 0 for a scalar."""
    return shape[0] if shape else 0


def _is_of_layouts(method: MergeMethod) -> bool:
    """Whether a conversion only renames and reshapes weights: it makes no deltas and no parameters of them."""
    result = method.declaration.result
    spaces = result.merge_space
    named = {space.identifier for space in spaces} if isinstance(spaces, frozenset) else set()
    return result.value_type is Tensor and named <= {"weight"}


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    return {key: metadata.shape for key, metadata in config.keys().items() if metadata.shape is not None}


def _links(source: ModelConfig, target: ModelConfig, method: MergeMethod) -> Mapping[str, Link]:
    by_rules = translations.links_between(source, target)
    return _links_of_method(source, target, method) if by_rules is None else by_rules


def _links_of_method(source: ModelConfig, target: ModelConfig, method: MergeMethod) -> Mapping[str, Link]:
    """What a conversion that is written as a merge method does, as far as its key map tells.

    One key that becomes several is divided into them in order, and several that become one are joined.
    """
    if method.map_keys is None:
        return {}
    parameter = method.declaration.names.args[0]
    before, after = _shapes(source), _shapes(target)
    made: dict[str, Link] = {}
    for relation in build_key_map(method.map_keys, {parameter: source}, target).relations:
        inputs, outputs = relation.clauses[0].by_param.get(parameter, ()), relation.outputs
        if not all(key in before for key in inputs) or not all(key in after for key in outputs):
            continue
        if len(inputs) == 1 and len(outputs) > 1:
            ends = list(itertools.accumulate(rows_of(after[key]) for key in outputs))
            if ends[-1] == rows_of(before[inputs[0]]):
                for key, start, stop in zip(outputs, [0, *ends], ends, strict=False):
                    made[key] = Link(key, (Part(inputs[0], start, stop),), after[key])
        elif len(outputs) == 1 and inputs:
            parts = tuple(Part(key, 0, rows_of(before[key])) for key in inputs)
            turned = len(inputs) == 1 and _turns(method, parameter, inputs[0], outputs[0], before, after)
            made[outputs[0]] = Link(outputs[0], parts, after[outputs[0]], turned)
    return made


def _turns(
    method: MergeMethod, parameter: str, key: str, made: str, before: Mapping[str, Shape], after: Mapping[str, Shape]
) -> bool:
    """Whether a conversion transposes a matrix; where its shape does not tell, it is asked with a small one."""
    shape = before[key]
    if len(shape) != 2 or len(after[made]) != 2 or after[made] != shape[::-1]:
        return False
    if shape[0] != shape[1]:
        return True
    probe = torch.arange(4.0).reshape(2, 2)
    relation = RealizedKeyRelation((made,), {parameter: (key,)})
    result = method.instantiate()(_Given({key: probe}), key=made, key_relation=relation, cache=None)
    return torch.equal(result[made] if isinstance(result, Mapping) else result, probe.mT)


class _Given(dict[str, Tensor], StateDict[Tensor]):
    """Values that stand for an input."""


def _chained(first: Mapping[str, Link], second: Mapping[str, Link]) -> dict[str, Link]:
    """The links of a layout to the one before the last, as links to the first."""
    made = {}
    for key, link in second.items():
        parts: list[Part] = []
        turned = link.turned
        for part in link.parts:
            inner = first.get(part.key)
            if inner is None:
                break
            if inner.turned:
                if len(link.parts) > 1 or part.stop - part.start != rows_of(inner.shape):
                    break
                parts += inner.parts
                turned = not turned
            else:
                parts += _cut(inner, part)
        else:
            made[key] = Link(key, tuple(parts), link.shape, turned)
    return made


def _cut(link: Link, wanted: Part) -> list[Part]:
    """The rows of what a link makes, where they come from."""
    if wanted.start == wanted.stop:
        return list(link.parts)  # a scalar
    found, place = [], 0
    for part in link.parts:
        start = max(wanted.start - place, 0)
        stop = min(wanted.stop - place, part.stop - part.start)
        if start < stop:
            found.append(Part(part.key, part.start + start, part.start + stop))
        place += part.stop - part.start
    return found
