"""Model configs: which architecture's keys every node of a recipe has.

Nodes that must share a config form a class: the inputs and the result of a method, unless its declaration names
configs. The state dicts in a class vote by their key names; declared configs decide. A class that no known config
fits is structural: its keys are those that all its state dicts have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from sd_mecha.errors import ConfigError
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.method import method_of
from sd_mecha.extensions.model_configs import Fit, KeyMetadata, ModelConfig, StructuralModelConfig, is_stub
from sd_mecha.planning.opening import OpenModels
from sd_mecha.planning.trail import describe, path_to
from sd_mecha.planning.unify import Classes
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.storage.contract import TensorEntry

Entries = Mapping[str, TensorEntry | None]


@dataclass(frozen=True)
class ConfigConstraint:
    """One thing known of a class: a declared config, or a state dict whose keys vote."""

    node: RecipeNode
    config: ModelConfig | None = None
    entries: Entries | None = None
    reason: str = "is declared"
    parts: Sequence[str] = ()  # the components of a state dict that is a pipeline


@dataclass
class ConfigFacts:
    """The answers: `config[node]`, and what the choice was among."""

    classes: Classes[ConfigConstraint]
    variable: dict[RecipeNode, int]
    _solved: dict[int, ModelConfig] = field(default_factory=dict)

    def __getitem__(self, node: RecipeNode) -> ModelConfig:
        return self._solved[self.classes.find(self.variable[node])]

    def as_mapping(self) -> dict[RecipeNode, ModelConfig]:
        return {node: self[node] for node in self.variable}

    def candidates(self, node: RecipeNode) -> list[ModelConfig]:
        """The known configs that the class of `node` may have, best first; none for a structural class."""
        return candidates_of(self.classes.constraints(self.variable[node]))

    def allows(self, node: RecipeNode, config: ModelConfig) -> bool:
        """Whether nothing known of the class of `node` speaks against a known config."""
        for c in self.classes.constraints(self.variable[node]):
            if c.config is not None and c.config is not model_configs.INFER:
                if c.config.identifier != config.identifier:
                    return False
            elif c.entries and config not in model_configs.fits(c.entries, [config]):
                return False
        return True


def collect(root: RecipeNode, models: OpenModels) -> ConfigFacts:
    """The classes of nodes below `root` and their constraints, before anything is chosen."""
    classes: Classes[ConfigConstraint] = Classes()
    variable: dict[RecipeNode, int] = {}
    for node in toposort(root):
        var = variable[node] = classes.new()
        if node.model_config is not None:
            classes.constrain(var, ConfigConstraint(node, config=cast(ModelConfig, node.model_config)))
        if isinstance(node, ModelRecipeNode):
            parts = getattr(models[node], "components", ())
            classes.constrain(var, ConfigConstraint(node, entries=models[node].entries, parts=parts))
        elif isinstance(node, LiteralRecipeNode):
            for child in node.children:
                classes.join(var, variable[child])
            classes.constrain(var, ConfigConstraint(node, entries=dict.fromkeys(node.value_dict)))
        elif isinstance(node, MergeRecipeNode):
            _join_call(node, var, variable, classes)
    return ConfigFacts(classes, variable)


def _join_call(
    node: MergeRecipeNode, var: int, variable: Mapping[RecipeNode, int], classes: Classes[ConfigConstraint]
) -> None:
    method = method_of(node)
    configs = method.get_input_configs()
    names = method.get_param_names()
    count = len(node.args)
    bound = list(zip(names.args_varargs(count), configs.args_varargs(count), node.args, strict=True))
    bound += [(name, configs.kwargs[name], child) for name, child in node.kwargs.items()]
    for name, config, child in bound:
        if config is None:
            classes.join(var, variable[child])
        else:
            reason = f"is what {method.identifier} takes as {name}"
            classes.constrain(variable[child], ConfigConstraint(child, config=config, reason=reason))
    returned = method.declaration.result.model_config
    if returned is not None:
        classes.constrain(var, ConfigConstraint(node, config=returned, reason=f"is what {method.identifier} returns"))


def solve_configs(
    root: RecipeNode,
    models: OpenModels,
    wanted: ModelConfig | None = None,
    preference: Iterable[ModelConfig] | None = None,
) -> ConfigFacts:
    """Choose a config for every node below `root`.

    Args:
        wanted: the config that the root must have.
        preference: of several candidates of the root, the first of these that is one.

    Raises:
        ConfigError: declared configs contradict each other, or a state dict fits none that the others allow; all
            contradictions are reported together.
    """
    facts = collect(root, models)
    if wanted is not None:
        facts.classes.constrain(
            facts.variable[root], ConfigConstraint(root, config=wanted, reason="is asked of the result")
        )
    root_class = facts.classes.find(facts.variable[root])
    problems: list[str] = []
    chosen: dict[tuple[object, ...], ModelConfig] = {}
    for var in facts.classes.roots():
        constraints = facts.classes.constraints(var)
        preferred = list(preference or ()) if var == root_class else []
        memo = (
            *(id(c.config) if c.entries is None else id(c.entries) for c in constraints),
            *map(id, preferred),
        )
        if memo not in chosen:
            try:
                chosen[memo] = _choose(root, constraints, preferred)
            except ConfigError as error:
                problems += error.problems
                continue
        facts._solved[var] = chosen[memo]
    if problems:
        raise ConfigError(problems)
    return facts


def _choose(root: RecipeNode, constraints: list[ConfigConstraint], preferred: list[ModelConfig]) -> ModelConfig:
    declared = _declared(root, constraints)
    if declared is not None and not is_stub(declared):
        _check_votes(root, declared, constraints)
        return declared
    in_parts = any(c.parts for c in constraints)  # a pipeline is described by its own components
    candidates = [] if in_parts or declared is model_configs.STRUCTURAL else candidates_of(constraints)
    if candidates:
        return next((c for c in preferred if c in candidates), candidates[0])
    if any(c.config is model_configs.INFER for c in constraints):
        node = next(c.node for c in constraints if c.config is model_configs.INFER)
        known = ", ".join(c.identifier for c in model_configs.get_all())
        raise ConfigError(f"no known model config fits {path_to(root, node)}; known are: {known}")
    if in_parts:
        _check_parts(root, constraints)
    elif declared is not model_configs.STRUCTURAL:
        _check_mixture(root, constraints)
    return structural(constraints)


def _declared(root: RecipeNode, constraints: list[ConfigConstraint]) -> ModelConfig | None:
    declared: ConfigConstraint | None = None
    for c in constraints:
        if c.config is None or c.config is model_configs.INFER:
            continue
        if declared is None or declared.config is None:
            declared = c
        elif declared.config.identifier != c.config.identifier:
            raise ConfigError(
                f"model configs do not agree: {declared.config.identifier} {declared.reason} "
                f"(at {path_to(root, declared.node)}), but {c.config.identifier} {c.reason} "
                f"(at {path_to(root, c.node)}); convert one of them with sd_mecha.convert(recipe, config)"
            )
        elif is_stub(declared.config):
            declared = c
    return None if declared is None else declared.config


def _check_votes(root: RecipeNode, config: ModelConfig, constraints: list[ConfigConstraint]) -> None:
    """A state dict without a declared config must at least look like the one that its class has."""
    certain = {c.node for c in constraints if c.config is not None}
    for c in constraints:
        if c.entries and c.node not in certain and config not in model_configs.fits(c.entries, [config]):
            example = next(iter(c.entries))
            raise ConfigError(
                f"config {config.identifier} does not fit {path_to(root, c.node)}: fewer than 10 % of its keys "
                f"(such as {example!r}) are in it; give that node its own config, or convert it"
            )


def _check_mixture(root: RecipeNode, constraints: list[ConfigConstraint]) -> None:
    """Two state dicts that fit different known configs, and none in common, cannot be merged key by key."""
    models = [(c, c.entries) for c in constraints if c.entries and isinstance(c.node, ModelRecipeNode)]
    votes = _votes([entries for _, entries in models])
    voters = [(c, found) for (c, _), found in zip(models, votes, strict=True)]
    known = [(c, found) for c, found in voters if found]
    for (one, first), (other, second) in itertools.pairwise(known):
        if not first.keys() & second.keys():
            raise ConfigError(
                f"model configs do not agree: {path_to(root, one.node)} looks like {_best(first)}, "
                f"{path_to(root, other.node)} like {_best(second)}; convert one with sd_mecha.convert(recipe, config)"
            )


def _check_parts(root: RecipeNode, constraints: list[ConfigConstraint]) -> None:
    """A pipeline is merged with what has keys of its components, and with nothing else."""
    pipeline = next(c for c in constraints if c.parts)
    for c in constraints:
        if c.entries and isinstance(c.node, ModelRecipeNode) and not c.entries.keys() & (pipeline.entries or {}).keys():
            example = next(iter(c.entries))
            raise ConfigError(
                f"{path_to(root, pipeline.node)} is a pipeline of {', '.join(pipeline.parts)}, and "
                f"{path_to(root, c.node)} shares no key with it (it has keys such as {example!r}); merge pipelines "
                "with each other, or one component by naming its folder"
            )


def _best(candidates: Mapping[ModelConfig, Fit]) -> str:
    return min(candidates, key=lambda c: candidates[c]).identifier


def candidates_of(constraints: Iterable[ConfigConstraint]) -> list[ModelConfig]:
    """Known configs that every state dict of a class may have, the one that fits best first."""
    voters: dict[int, Entries] = {}  # one state dict may stand in many nodes, which then share a vote
    scores: dict[ModelConfig, Fit] | None = None
    for c in constraints:
        if c.config is not None and not is_stub(c.config):
            return [c.config]
        if c.entries:
            voters[id(c.entries)] = c.entries
    for found in _votes(list(voters.values())):
        if scores is None:
            scores = found
        else:
            scores = {config: total.plus(found[config]) for config, total in scores.items() if config in found}
        if not scores:
            return []
    return sorted(scores or (), key=lambda config: (scores or {})[config])


def _votes(voters: list[Entries]) -> list[dict[ModelConfig, Fit]]:
    """How each state dict fits the configs that any of them suggests."""
    every = list(dict.fromkeys(config for entries in voters for config in model_configs.fits(entries)))
    return [model_configs.fits(entries, every) for entries in voters]


def structural(constraints: Iterable[ConfigConstraint]) -> StructuralModelConfig:
    """The keys that all state dicts of a class have in common, in the order of the first one."""
    constraints = list(constraints)
    nodes = [c.node for c in constraints if c.entries is not None]
    voters = [c.entries for c in constraints if c.entries is not None]
    if not voters:
        return StructuralModelConfig(())
    voters.sort(key=lambda entries: all(e is None for e in entries.values()))  # models before literals
    first, *others = {id(v): v for v in voters}.values()
    distinct = {frozenset(v) for v in others}
    keys = {}
    for key, entry in first.items():
        if all(key in other for other in distinct):
            keys[key] = KeyMetadata() if entry is None else KeyMetadata(entry.shape, entry.dtype)
    parts = dict.fromkeys(part for c in constraints for part in c.parts)
    source = next((describe(n) for n in nodes if isinstance(n, ModelRecipeNode)), "")
    return StructuralModelConfig(keys, source, parts)
