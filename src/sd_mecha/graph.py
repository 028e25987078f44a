"""Looking into a recipe without merging it: what configs and merge spaces its root may have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sd_mecha.errors import ConfigError
from sd_mecha.extensions import merge_spaces, model_configs
from sd_mecha.extensions.merge_methods import RecipeNodeOrValue, value_to_node
from sd_mecha.extensions.merge_spaces import MergeSpace
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.planning.configs import collect, solve_configs
from sd_mecha.planning.finalize import fill_in
from sd_mecha.planning.interfaces import choose_implementations
from sd_mecha.planning.opening import OpenModels, open_models
from sd_mecha.planning.plan import check_models
from sd_mecha.planning.spaces import prefer, solve_spaces
from sd_mecha.planning.uses import unshare
from sd_mecha.recipes.nodes import RecipeNode

Configs = str | ModelConfig | Iterable[str | ModelConfig] | None
Spaces = str | MergeSpace | Iterable[str | MergeSpace] | None


@dataclass(frozen=True)
class RootCandidates:
    """What the root of a recipe may be; empty where nothing known fits, which leaves the structural config."""

    model_config: list[ModelConfig]
    merge_space: list[MergeSpace]


class RecipeGraph:
    """An analysed recipe whose models are open."""

    def __init__(self, root: RecipeNode, models: OpenModels, configs: bool, spaces: bool) -> None:
        root = unshare(root)
        self.root = choose_implementations(root, models) if configs else root
        self.models = models
        self._solve_configs = configs
        self._solve_spaces = spaces

    def root_candidates(
        self,
        model_config: Configs = None,
        merge_space: Spaces = None,
        model_config_preference: Configs = None,
        merge_space_preference: Spaces = None,
    ) -> RootCandidates:
        """What the root may be, given what it must be and what is preferred."""
        configs: list[ModelConfig] = []
        if self._solve_configs:
            configs = collect(self.root, self.models).candidates(self.root)
            if wanted := _configs(model_config):
                configs = [c for c in configs if c in wanted]
            preferred = [c for c in _configs(model_config_preference) if c in configs]
            configs = preferred[:1] or configs
        spaces: list[MergeSpace] = []
        if self._solve_spaces:
            found = solve_spaces(self.root, _spaces(merge_space) or None).candidates(self.root)
            best = [s for s in _spaces(merge_space_preference) if s in found]
            spaces = best[:1] or [s for s in merge_spaces.get_all() if s in found]
        return RootCandidates(configs, spaces)

    def finalize_root(
        self,
        model_config: Configs = None,
        merge_space: Spaces = None,
        model_config_preference: Configs = None,
        merge_space_preference: Spaces = None,
        check_extra_keys: bool = True,
        check_mandatory_keys: bool = True,
    ) -> RecipeNode:
        """The recipe with configs and merge spaces filled in.

        Raises:
            ConfigError, MergeSpaceError: they contradict each other, or what is asked of the root.
            PlanError: a model lacks mandatory keys, where `check_mandatory_keys` asks for them.
        """
        configs = spaces = None
        if self._solve_configs:
            wanted = _configs(model_config)
            if len(wanted) > 1:
                wanted = [c for c in collect(self.root, self.models).candidates(self.root) if c in wanted]
                if not wanted:
                    raise ConfigError("none of the model configs asked for fits the recipe")
            solved = solve_configs(
                self.root, self.models, wanted[0] if wanted else None, _configs(model_config_preference)
            )
            configs = solved.as_mapping()
            check_models(self.root, self.models, configs, check_mandatory_keys, check_extra_keys)
        if self._solve_spaces:
            preference = _spaces(merge_space_preference)
            asked = _spaces(merge_space) or None
            spaces = solve_spaces(self.root, asked)
            best = prefer(spaces.candidates(self.root), preference or None)
            if best is not None:
                spaces = solve_spaces(self.root, [best])
        return fill_in(self.root, configs, spaces)


@contextmanager
def open_graph(
    root: RecipeNodeOrValue,
    buffer_size_per_dict: int = 0,
    root_only: bool = False,
    solve_model_config: bool = True,
    solve_merge_space: bool = True,
) -> Iterator[RecipeGraph]:
    """Open the models of a recipe, headers only, and analyse it.

    Args:
        root: the recipe.
        buffer_size_per_dict: for compatibility; headers need no buffers.
        root_only: for compatibility; candidates are always those of the root, and the whole recipe is finalised.
        solve_model_config: whether to infer model configs.
        solve_merge_space: whether to infer merge spaces.
    """
    del buffer_size_per_dict, root_only
    node = value_to_node(root)
    with open_models(node) as models:
        yield RecipeGraph(node, models, solve_model_config, solve_merge_space)


def _configs(wanted: Configs) -> list[ModelConfig]:
    return [model_configs.resolve(c) for c in _listed(wanted)]


def _spaces(wanted: Spaces) -> list[MergeSpace]:
    return [merge_spaces.resolve(s) for s in _listed(wanted)]


def _listed(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    if isinstance(value, str | MergeSpace) or hasattr(value, "identifier"):
        return [value]
    return list(value)
