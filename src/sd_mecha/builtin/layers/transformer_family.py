"""Diffusion transformers that are published in the original layout, below a prefix, and in that of diffusers.

Their hyper-parameters of one name mean one thing:

- `width`: channels of a token; `head`: of an attention head (0 where queries and keys are not normalised); `inner`:
  inside a feed-forward layer, values and gates having as many each.
- `depth`: number of blocks; `double`, `single`: of those in which text and image have weights of their own, and of
  those over both alike.
- `channels`: of a patch, in and out; `inputs`, `outputs`: of a patch, where the two differ.
- `context`: channels of the text; `pooled`: of the vector that describes the whole text.
- `guided`: whether the strength of the guidance is an input.

Others are explained with their class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

from sd_mecha.extensions.config_families import Family, Keys, Layout, translated
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.header_views import read_through
from sd_mecha.extensions.hyperparameters import reader
from sd_mecha.extensions.layouts import Rule, RuleTable, prefixed
from sd_mecha.extensions.model_configs import register_family

H = TypeVar("H")

PREFIX = "model.diffusion_model."


def register(
    name: str,
    variants: Mapping[str, H],
    *,
    build: Callable[[H], Keys],
    signs: tuple[str, ...],
    check: Callable[[Header], bool] | None = None,
    rules: Callable[[H], list[Rule]] | None = None,
    to_comfyui: Callable[[H], list[Rule]] | None = None,
    prefix: str = PREFIX,
    dtype: torch.dtype = torch.bfloat16,
    others: Callable[[H], Mapping[str, Keys]] = lambda hyper: {},
    absent: Iterable[tuple[str, str]] = (),
    foreign: tuple[str, ...] = (),
) -> None:
    """Register a family of the layouts `original`, `comfyui` and, if its names are others, `diffusers`.

    Args:
        name, variants, absent: see `Family`; the fields of the hyper-parameters tell where they are read.
        build: hyper-parameters -> keys of the original layout.
        signs: patterns of keys in the original layout, see `Layout`.
        check: whether a file of the original layout is of this family, or of a similar one.
        rules: from the original layout to that of diffusers; of all sizes they rename alike what is read. None where
            both have the same names: then there is no layout `diffusers`.
        to_comfyui: the same to that of ComfyUI, where it does not only have a prefix.
        prefix: of the layout `comfyui` otherwise.
        dtype: in which the tensors are published.
        others: what else files of the layout `comfyui` may hold.
        foreign: patterns of keys that only other networks have, in the original layout or in that of diffusers.
    """
    example = next(iter(variants.values()))
    read = reader(type(example), check)

    def diffuser(hyper: H) -> Mapping[str, Keys]:
        return {"diffuser": build(hyper)}

    def below(hyper: H) -> list[Rule]:
        return prefixed(build(hyper), prefix)

    def made_by(rules: Callable[[H], list[Rule]]) -> Layout[H]:
        made = rules(example)
        table = RuleTable(made)
        there = tuple(name for sign in signs for name in table.find(sign)[1])
        return Layout(translated(diffuser, rules), there, read_through(read, made), dtype=dtype, foreign=foreign)

    layouts = {
        "original": Layout(diffuser, signs, read, dtype=dtype, foreign=foreign),
        "comfyui": made_by(to_comfyui) if to_comfyui else Layout(diffuser, signs, read, prefix, dtype, others, foreign),
    }
    ways = {("original", "comfyui"): to_comfyui or below}
    if rules is not None:
        layouts["diffusers"] = made_by(rules)
        ways["original", "diffusers"] = rules
    register_family(Family(name, type(example), variants, layouts, ways, absent))
