"""Adapters that are added up, brought to another rank, or given other names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from sd_mecha.adapters.places import Places, PlacesInModel, SameNames
from sd_mecha.adapters.ranks import RankRule, rank_rule
from sd_mecha.adapters.result import Adapter
from sd_mecha.adapters.sources import AdapterSource, Source, config_of
from sd_mecha.adapters.styles import STYLES, style_of
from sd_mecha.adapters.sums import members, total, write_module
from sd_mecha.builtin.methods.common import check_finite
from sd_mecha.errors import AdapterError, ParameterError
from sd_mecha.storage.dtypes import parse_dtype

Weighted = Sequence[tuple[AdapterSource, float]]


def combine_adapters(
    adapters: Iterable[tuple[Source, float] | Source],
    *,
    rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    conv_rank: int | None = None,
    style: str | None = None,
    base: Any = None,
    dtype: torch.dtype | str | None = None,
    output: Any = None,
) -> dict[str, Any]:
    """Add adapters up to one adapter, each times a weight.

    Without a rank the sum is exact: the factors stand side by side, and ranks add up. With one, or a share, they are
    brought to that by a decomposition of the factors alone. LoRA, LoHa and LoKr become a LoRA; changes that are
    stored whole are added as they are.

    Args:
        adapters: (adapter, weight) pairs, or adapters, whose weight is 1: paths, state dicts, or recipes.
        rank: the largest rank of each module.
        energy: keep as few singular values of each module as make this share of the sum of their squares.
        frobenius: the same of the Frobenius norm, which is the root of that.
        conv_rank: `rank` of kernels of more than one element.
        style: whose names the result has, `kohya`, `comfyui`, `diffusers` or `peft`; needs a `base`. Without one,
            those of the first adapter.
        base: the model that the adapters are for, its config, or the name of one. It tells which names mean the
            same; without it only equal names do.
        dtype: of the tensors of the result; None: that of most tensors of the first adapter.
        output: a path: the adapter is written there as well.

    Returns:
        The state dict of the sum. Its `__metadata__` tells, as JSON under `mecha_adapter`, the rank of each module
        and its error relative to the exact sum.

    Raises:
        ParameterError: an argument is out of range.
        AdapterError: one is no adapter, or cannot be told without a model, or has no place in the base.
        ShapeError: modules of one name differ in shape.

    >>> lora = {"a.lora_up.weight": torch.ones(2, 1), "a.lora_down.weight": torch.ones(1, 2)}
    >>> both = combine_adapters([(lora, 1.0), (lora, 0.5)])
    >>> both["a.lora_up.weight"] @ both["a.lora_down.weight"]
    tensor([[1.5000, 1.5000],
            [1.5000, 1.5000]])
    """
    caller = "combine_adapters"
    rule = rank_rule(caller, rank, conv_rank, energy, frobenius)
    if style is not None:
        style_of(caller, style)
        if base is None:
            raise ParameterError(f"{caller}: style={style!r} needs base=, the model or config whose modules it names")
    pairs = [_pair(caller, item) for item in adapters]
    if not pairs:
        raise ParameterError(f"{caller}: got no adapter; expected at least one")
    with ExitStack() as stack:
        sources = [(stack.enter_context(AdapterSource(source)), weight) for source, weight in pairs]
        return _combine(sources, rule, style, base, dtype).finished(style or _style(sources[0][0]), output, kind="lora")


def resize_adapter(
    adapter: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    conv_rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    output: Any = None,
) -> dict[str, Any]:
    """Bring an adapter to a lower rank, by a decomposition of its factors alone.

    Args:
        adapter: a path, a state dict or a recipe.
        rank, energy, frobenius, conv_rank: how much is kept of each module, as in `combine_adapters`; at least one.
        dtype: of the tensors of the result; None: that of most tensors of the adapter.
        output: a path: the adapter is written there as well.

    Returns:
        The state dict, under the same names; see `combine_adapters`. Modules of lower rank keep theirs.

    Raises:
        ParameterError: an argument is out of range, or none is given.
        AdapterError, ShapeError: as `combine_adapters`.

    >>> lora = {"a.lora_up.weight": torch.ones(2, 2), "a.lora_down.weight": torch.ones(2, 2)}
    >>> resize_adapter(lora, rank=1)["a.lora_up.weight"].shape
    torch.Size([2, 1])
    """
    caller = "resize_adapter"
    rule = rank_rule(caller, rank, conv_rank, energy, frobenius)
    if rule is None:
        raise ParameterError(f"{caller}: got no rank; expected one of rank=16, energy=0.95, frobenius=0.9 or the like")
    with AdapterSource(adapter) as source:
        made = _combine([(source, 1.0)], rule, None, None, dtype)
        return made.finished(_style(source), output, kind="lora")


def _pair(caller: str, item: Any) -> tuple[Source, float]:
    source, weight = item if isinstance(item, tuple) else (item, 1.0)
    check_finite(caller, "weight", weight)
    return source, float(weight)


def _combine(
    sources: Weighted, rule: RankRule | None, style: str | None, base: Any, dtype: torch.dtype | str | None
) -> Adapter:
    first = sources[0][0]
    names = STYLES[style or _style(first)]
    places: Places = SameNames() if base is None else PlacesInModel(config_of(base), names)
    if base is None:
        _check_manners([source for source, _ in sources])
    endings = names.endings if base is not None else first.endings()
    made = Adapter(parse_dtype(dtype) or first.dtype(), endings, endings == "kohya")
    for (module, parameter), parts in members(sources, places).items():
        write_module(made, module, parameter, total(module, parts), rule)
    return made


def _style(source: AdapterSource) -> str:
    """The style that the names of an adapter are nearest to."""
    names = [module.name for module in source.modules]
    if source.endings() == "kohya":
        return "comfyui" if any("." in name for name in names) else "kohya"
    return "peft" if any(name.startswith("base_model.") for name in names) else "diffusers"


def _check_manners(sources: Sequence[AdapterSource]) -> None:
    """Refuse names that cannot be told to mean the same: the sum would hold some modules twice."""
    first = sources[0]
    for source in sources:
        if _style(source) != _style(first):
            raise AdapterError(
                f"{first.name} names its modules in the style {_style(first)}, such as {first.modules[0].name!r}, "
                f"{source.name} in the style {_style(source)}, such as {source.modules[0].name!r}; give base=, the "
                "model that they are for"
            )
