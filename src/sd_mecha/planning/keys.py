"""Keys: which keys every node of a recipe can produce, and from which keys of its inputs.

Sets of keys are shared: nodes whose inputs hold equal sets get the very same set object, so that a chain of 100,000
merges over one model costs a handful of set intersections, and relations are realised once for equal circumstances.

`missing` names (node, key) pairs that turned out not to exist while merging (an input with NaN, a skipped key);
solving again with them gives what the recipe makes of that key without them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sd_mecha.errors import ContractError, PlanError, StateDictKeyError
from sd_mecha.extensions.key_map import KeyMap, RealizedKeyRelation, realize
from sd_mecha.extensions.method import MergeMethod, method_of
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.extensions.parameters import StateDict
from sd_mecha.planning.markers import is_marker
from sd_mecha.planning.opening import OpenModels
from sd_mecha.planning.trail import named_children
from sd_mecha.recipes.nodes import LiteralRecipeNode, MergeRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort

KeySet = frozenset[str]
Missing = Collection[tuple[RecipeNode, str]]
Source = tuple[RecipeNode, str]


@dataclass
class KeyFacts:
    """The answers, by node."""

    available: dict[RecipeNode, KeySet] = field(default_factory=dict)
    realized: dict[RecipeNode, Mapping[str, RealizedKeyRelation]] = field(default_factory=dict)
    """Nodes whose method declares `map_keys`: output key -> what it is made from."""
    chosen: dict[RecipeNode, Callable[[str], Source | None]] = field(default_factory=dict)
    """Nodes whose method only selects: output key -> the input that it is."""
    skips: bool = False
    """Whether a selecting method leaves out keys on purpose."""
    stored: dict[RecipeNode, Mapping[str, str]] = field(default_factory=dict)
    """Model nodes whose file uses other names: key of the config -> name in the file."""
    carried: dict[str, ModelRecipeNode] = field(default_factory=dict)
    """Markers that the result would lose: key -> the first model that has it, which it is copied from."""
    reports: dict[str, bool] = field(default_factory=dict)
    """What key maps leave out of their inputs, and whether that is an error."""
    created: dict[RecipeNode, int] = field(default_factory=dict)
    """Model nodes whose config makes keys that the file lacks: the reader that holds them."""


def solve_keys(
    roots: Iterable[RecipeNode],
    models: OpenModels,
    configs: Mapping[RecipeNode, ModelConfig],
    missing: Missing = (),
    key_maps: KeyMaps | None = None,
) -> KeyFacts:
    """Find what every node below `roots` can produce.

    Args:
        key_maps: those of an earlier call, which need not be built again.

    Raises:
        PlanError: a method's key map or selection refuses its inputs.
    """
    return _Solver(models, configs, missing, key_maps or KeyMaps()).run(toposort(*roots))


class KeyMaps:
    """The key maps of methods for the configs of their inputs, each built once."""

    def __init__(self) -> None:
        self._maps: dict[object, KeyMap] = {}
        self._alive: list[object] = []  # what the keys of the memo mention by id

    def of(self, method: MergeMethod, configs: Mapping[str, Any], output: ModelConfig) -> KeyMap:
        """The key map of a method; `configs` holds a config, or a tuple of them, for each parameter."""
        shown = tuple((name, c if isinstance(c, tuple) else (c,)) for name, c in configs.items())
        memo = (id(method), tuple((n, tuple(id(c) for c in group)) for n, group in shown), id(output))
        if memo not in self._maps:
            self._alive += [method, output, configs]
            key_map = method.build_key_map(configs, output)
            assert key_map is not None
            self._maps[memo] = key_map
        return self._maps[memo]


class _Solver:
    def __init__(
        self, models: OpenModels, configs: Mapping[RecipeNode, ModelConfig], missing: Missing, key_maps: KeyMaps
    ) -> None:
        self.models = models
        self.configs = configs
        self.facts = KeyFacts()
        self.missing: dict[RecipeNode, set[str]] = {}
        for node, key in missing:
            self.missing.setdefault(node, set()).add(key)
        self._interned: dict[KeySet, KeySet] = {}
        self._sets: dict[object, KeySet] = {}
        self._realized: dict[object, Mapping[str, RealizedKeyRelation]] = {}
        self._key_maps = key_maps
        self._alive: list[object] = []  # what memo keys mention by id

    def run(self, order: list[RecipeNode]) -> KeyFacts:
        for node in order:
            if isinstance(node, ModelRecipeNode):
                keys = self._model(node)
            elif isinstance(node, LiteralRecipeNode):
                keys = self._literal(node)
            else:
                assert isinstance(node, MergeRecipeNode)
                keys = self._merge(node)
            if gone := self.missing.get(node):
                keys = self._intern(keys - gone)
            self.facts.available[node] = keys
        self._carry(order)
        return self.facts

    def _carry(self, order: list[RecipeNode]) -> None:
        """Find the markers of the models that the last node is made of, where it has none itself."""
        root = order[-1]
        kept = self.facts.available[root]
        if not kept:
            return
        wanted = self.configs[root].identifier
        markers: dict[int, list[str]] = {}
        found: dict[str, ModelRecipeNode] = {}
        for node in order:
            if not isinstance(node, ModelRecipeNode) or self.configs[node].identifier != wanted:
                continue
            place = self.models.index[node]
            if place not in markers:
                markers[place] = [name for name in self.models[node].entries if is_marker(name)]
            for name in markers[place]:
                if name not in kept:
                    found.setdefault(name, node)
        if found:
            for component in self.configs[root].components().values():
                if kept.isdisjoint(component.keys()):  # dropped on purpose, with its markers
                    found = {name: node for name, node in found.items() if name not in component.keys()}  # noqa: SIM118
        self.facts.carried = found

    def _intern(self, keys: KeySet) -> KeySet:
        return self._interned.setdefault(keys, keys)

    def _config_keys(self, config: ModelConfig) -> KeySet:
        key = ("config", id(config))
        if key not in self._sets:
            self._alive.append(config)
            self._sets[key] = self._intern(frozenset(config.keys()))
        return self._sets[key]

    def _model(self, node: ModelRecipeNode) -> KeySet:
        reader, config = self.models[node], self.configs[node]
        found = self._intern(frozenset(reader.entries))
        wanted = self._config_keys(config)
        keys = self._meet(found, wanted)
        if len(keys) < len(wanted) and len(keys) < len(found):
            aliases = {}
            for name in found - keys:
                key = config.resolve_alias(name)
                if key in wanted and key not in keys:
                    aliases[key] = name
            if aliases:
                self.facts.stored[node] = aliases
                keys = self._intern(keys.union(aliases))
        if len(keys) < len(wanted):
            place = self.models.created(node, config, wanted - keys)
            if place is not None:
                self.facts.created[node] = place
                keys = self._intern(keys.union(self.models.readers[place].entries))
        return keys

    def _literal(self, node: LiteralRecipeNode) -> KeySet:
        keys = {k for k, v in node.value_dict.items() if not isinstance(v, RecipeNode) or k in self.facts.available[v]}
        return self._meet(self._intern(frozenset(keys)), self._config_keys(self.configs[node]))

    def _meet(self, *sets: KeySet) -> KeySet:
        unique = tuple({id(s): s for s in sets}.values())
        if len(unique) == 1:
            return unique[0]
        key = ("meet", *(id(s) for s in unique))
        if key not in self._sets:
            self._sets[key] = self._intern(frozenset.intersection(*sorted(unique, key=len)))
        return self._sets[key]

    def _merge(self, node: MergeRecipeNode) -> KeySet:
        method = method_of(node)
        if method.map_keys is None:
            inputs = [self.facts.available[child] for child in node.children]
            keys = self._meet(self._config_keys(self.configs[node]), *inputs)
        else:
            relations = self._realize(node, method)
            self.facts.realized[node] = relations
            keys = self._intern(frozenset(relations))
        if method.tiling == "select":
            choice = self.facts.chosen[node] = Choice(node, self)
            if method.map_keys is None:  # a key map has settled which keys exist; otherwise the method may skip some
                kept = self._intern(frozenset(key for key in keys if choice(key) is not None))
                self.facts.skips |= len(kept) < len(keys)
                keys = kept
        return keys

    def _realize(self, node: MergeRecipeNode, method: MergeMethod) -> Mapping[str, RealizedKeyRelation]:
        by_param: dict[str, list[RecipeNode]] = {}
        for name, child in named_children(node):
            by_param.setdefault(name, []).append(child)
        available = {name: self._meet(*(self.facts.available[c] for c in group)) for name, group in by_param.items()}
        key_map = self._key_map(method, by_param, self.configs[node])
        memo = ("realized", id(key_map), tuple((name, id(keys)) for name, keys in available.items()))
        empty: KeySet = frozenset()

        def has(param: str, key: str) -> bool:
            return key in available.get(param, empty)

        for text in (text for report in key_map.reports for text in report(has)):
            strict = self.facts.reports.get(text, False)
            self.facts.reports[text] = strict or any(self._is_true(node) for node in by_param.get("strict", ()))
        if memo not in self._realized:
            found: dict[str, RealizedKeyRelation] = {}
            for relation in key_map.relations:
                chosen = realize(relation, has)
                if chosen is not None:
                    found.update(dict.fromkeys(chosen.outputs, chosen))
            self._realized[memo] = found
        return self._realized[memo]

    def _is_true(self, node: RecipeNode) -> bool:
        return constant(node, self.facts) is True

    def _key_map(self, method: MergeMethod, by_param: Mapping[str, list[RecipeNode]], output: ModelConfig) -> KeyMap:
        varargs = method.declaration.names.vararg
        configs: dict[str, Any] = {}
        for name, group in by_param.items():
            found = tuple(self.configs[child] for child in group)
            configs[name] = found if name == varargs else found[0]
        for name, _ in method.declaration:
            configs.setdefault(name, ())
        return self._key_maps.of(method, configs, output)


class Choice:
    """What a selecting method takes, key by key: it is called on references instead of values."""

    def __init__(self, node: MergeRecipeNode, solver: _Solver) -> None:
        method = method_of(node)
        data = method.declaration.parameters
        positional = zip(data.args_varargs(len(node.args)), node.args, strict=True)
        self._args = [_Reference.bind(d, child, solver) for d, child in positional]
        self._kwargs = {n: _Reference.bind(data.kwargs[n], child, solver) for n, child in node.kwargs.items()}
        self._references = [a for a in (*self._args, *self._kwargs.values()) if isinstance(a, _Reference)]
        self._relations = solver.facts.realized.get(node)
        self._available = solver.facts.available
        self._method = method
        self._instance = method.instantiate()

    def __call__(self, key: str) -> Source | None:
        """The input that the result is at `key`; None where the method skips it.

        Raises:
            PlanError: the method refuses its arguments.
            ContractError: it returns something that is not one of its inputs.
        """
        for reference in self._references:
            reference.key = key
        extra = {}
        if self._method.declaration.accepts_context:
            relation = identity_relation(self._method, key) if self._relations is None else self._relations[key]
            extra = {"key": key, "key_relation": relation, "cache": None, "output_reused": False}
        try:
            result = self._instance(*self._args, **self._kwargs, **extra)
        except StateDictKeyError:
            return None
        except ValueError as error:
            raise PlanError(str(error)) from error
        if isinstance(result, _Reference):
            result = (result.node, result.key)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], RecipeNode)):
            raise ContractError(
                f'{self._method.identifier} declares tiling="select" but returned a {type(result).__name__} for key '
                f"{key!r}; it must return one of its inputs as it is"
            )
        return result if result[1] in self._available[result[0]] else None


class _Reference(StateDict[Any]):
    """Stands for an input of a selecting method; indexing it gives the (node, key) that was asked for."""

    def __init__(self, node: RecipeNode, keys: KeySet, config: ModelConfig) -> None:
        self.node = node
        self.key = ""
        self._keys = keys
        self.model_config = config

    @classmethod
    def bind(cls, data: Any, child: RecipeNode, solver: _Solver) -> Any:
        if data.value_type is str or (data.value_type in (int, float, bool) and not data.is_state_dict):
            return constant(child, solver.facts)
        return cls(child, solver.facts.available[child], solver.configs[child])

    def __getitem__(self, key: str) -> Source:
        if key not in self._keys:
            raise StateDictKeyError(key)
        return self.node, key

    def __iter__(self) -> Any:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def constant(node: RecipeNode, facts: KeyFacts) -> Any:
    """The one Python value that a node holds for every key.

    Raises:
        PlanError: the value differs by key or has to be computed.
    """
    if node in facts.chosen:
        sources = {facts.chosen[node](key) for key in facts.available[node]}
        source, key = sources.pop() or (None, "")
        if not sources and isinstance(source, LiteralRecipeNode):
            return source.value_dict[key]
    raise PlanError("a parameter that selects keys must be a plain value, the same for every key")


def identity_relation(method: MergeMethod, key: str) -> RealizedKeyRelation:
    """What a method without `map_keys` makes `key` from: the same key of every parameter."""
    return RealizedKeyRelation((key,), {name: (key,) for name, _ in method.declaration})
