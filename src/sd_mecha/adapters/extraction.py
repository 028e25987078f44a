"""An adapter that stands for the difference of two models."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from sd_mecha.adapters.factors import low_rank
from sd_mecha.adapters.ranks import RankRule, check_rank_fits, rank_rule
from sd_mecha.adapters.result import Adapter
from sd_mecha.adapters.sources import Source, node_of
from sd_mecha.adapters.styles import Style, style_of
from sd_mecha.builtin.methods.common import check_choice, check_range
from sd_mecha.builtin.methods.kronecker import factor_shape, kronecker_factors
from sd_mecha.conversion import convert
from sd_mecha.errors import AdapterError, ParameterError
from sd_mecha.extensions import merge_methods
from sd_mecha.extensions.model_configs import ModelConfig
from sd_mecha.merging import plan, stream
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.storage.dtypes import parse_dtype
from sd_mecha.units import such_as

_logger = logging.getLogger("sd_mecha")

_CALLER = "extract_adapter"
_WEIGHT, _BIAS = ".weight", ".bias"


def extract_adapter(
    tuned: Source,
    base: Source | None = None,
    *,
    kind: str = "lora",
    rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    conv_rank: int | None = None,
    kronecker_ratio: float = 0.5,
    diffs: bool = False,
    style: str = "kohya",
    randomized: bool = True,
    iterations: int = 2,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float16,
    device: str | torch.device = "cpu",
    output: Any = None,
) -> dict[str, Any]:
    """Extract an adapter from the difference of two models of any architecture.

    Each matrix, and each kernel flattened to `shape[0]` rows, becomes the product of two thin factors, or the
    Kronecker product of two small matrices. Weights are read one at a time; only factors are kept. Tensors that do
    not differ get no module.

    Args:
        tuned: the model, or without a `base` the difference itself: a path, a state dict or a recipe.
        base: what to extract the difference to.
        kind: `lora`, or `lokr`.
        rank: of each module; for small matrices no more than they have. With a share, the most that it may lead to.
            Of a LoKr it is that of the second matrix, which without any of these stays whole.
        energy: take as few singular values of each matrix as make this share of the sum of their squares.
        frobenius: the same of the Frobenius norm, which is the root of that.
        conv_rank: `rank` of kernels of more than one element.
        kronecker_ratio: how the entries of a LoKr are shared out, see `truncate_kronecker`.
        diffs: whether changes of biases and norms are stored, as they are; not in the styles of PEFT and diffusers.
        style: whose names to write: `kohya`, `comfyui`, `diffusers` or `peft`.
        randomized: find the leading singular vectors by a randomised subspace iteration, much faster at low rank.
        iterations: rounds of that iteration.
        seed: of its random vectors; the same seed gives the same adapter.
        dtype: of the tensors of the adapter.
        device: where to compute.
        output: a path: the adapter is written there as well.

    Returns:
        The state dict. Its `__metadata__` tells, as JSON under `mecha_adapter`, the rank of each module, and how far
        it is from the difference: the norm of what is missing relative to the norm of the difference.

    Raises:
        ParameterError: an argument is out of range, or no rank is given, or a rank that no matrix has.
        AdapterError: the models do not differ where the adapter could say so.
        PlanError: the models are of different architectures, or shapes.

    >>> tuned = {"layer.weight": torch.eye(4)[:, :1] @ torch.ones(1, 4)}
    >>> made = extract_adapter(tuned, {"layer.weight": torch.zeros(4, 4)}, rank=1, style="peft")
    >>> [key for key in made if key != "__metadata__"]
    ['base_model.model.layer.lora_A.weight', 'base_model.model.layer.lora_B.weight']
    """
    check_choice(_CALLER, "kind", kind, ("lora", "lokr"))
    check_range(_CALLER, "iterations", iterations, 0)
    check_range(_CALLER, "kronecker_ratio", kronecker_ratio, 0, 1)
    names = style_of(_CALLER, style)
    rule = rank_rule(_CALLER, rank, conv_rank, energy, frobenius)
    if rule is None and kind == "lora":
        raise ParameterError(f"{_CALLER}: got no rank; expected one of rank=16, energy=0.95, frobenius=0.9 or the like")
    if diffs and not names.diffs:
        raise ParameterError(
            f"{_CALLER}: style {style!r} has no names for changes of biases and norms; leave out diffs, or choose "
            "'kohya' or 'comfyui'"
        )
    stored = parse_dtype(dtype)
    assert stored is not None
    made = Adapter(stored, names.endings, names.alphas)
    left: list[str] = []
    for module, parameter, key, tensor in _deltas(_delta(tuned, base), names, rule, device):
        delta = tensor.cpu()
        if not delta.is_floating_point() or not bool(delta.any()):
            continue
        if module is None or (delta.dim() < 2 and not diffs):
            left.append(key)
        elif parameter == "bias" or delta.dim() < 2:
            made.put(f"{module}.{'diff_b' if parameter == 'bias' else 'diff'}", delta)
        elif kind == "lora":
            assert rule is not None
            matrix, kernel = tensor.flatten(1), tuple(delta.shape[2:])
            factors = low_rank(matrix, rule, math.prod(kernel) > 1, randomized=randomized, iters=iterations, seed=seed)
            made.measure(module, delta.flatten(1), made.add_lora(module, factors[0].cpu(), factors[1].cpu(), kernel))
        else:
            _add_lokr(made, module, tensor, rule, kronecker_ratio, (randomized, iterations, seed))
    if not made.tensors:
        raise AdapterError(_nothing(left, diffs))
    if left:
        _logger.warning(
            "%d tensors that differ have no place in the adapter, %s%s",
            len(left),
            such_as(left),
            "" if diffs or not names.diffs else "; diffs=True stores those of biases and norms",
        )
    return made.finished(style, output, kind=kind)


def _delta(tuned: Source, base: Source | None) -> RecipeNode:
    if base is None:
        return node_of(tuned, "delta")
    difference: RecipeNode = merge_methods.resolve("subtract")(node_of(tuned), node_of(base))
    return difference


def _deltas(
    delta: RecipeNode, style: Style, rule: RankRule | None, device: str | torch.device
) -> Iterator[tuple[str | None, str, str, Tensor]]:
    """Yield module, parameter, key and change of each tensor; a module that the style cannot name is None."""
    options: dict[str, Any] = {"output_dtype": None, "strict_merge_space": "delta", "tqdm": None}
    with plan(delta, allow_empty_merge=True, **options) as planned:
        if not planned.outputs[0]:
            raise AdapterError(
                f"{_CALLER}: {_inputs(delta)} have no key in common; "
                "expected a tuned model and the base that it was tuned from"
            )
        config = cast(ModelConfig, planned.finalized(0).model_config)  # planning chooses one
        shapes = [entry.shape for entry in planned.outputs[0].values() if len(entry.shape) > 1]
    check_rank_fits(_CALLER, rule, max((min(shape[0], math.prod(shape[1:])) for shape in shapes), default=0))
    options |= {"merge_device": device, "output_device": device, "threads": 0}
    target = style.layout(config)
    sources: list[tuple[ModelConfig, RecipeNode]] = [(target, delta if target is config else convert(delta, target))]
    pick = merge_methods.resolve("pick_component")
    if target is not config:  # parts that the other layout lacks, such as text encoders, under the names that they have
        others = [name for name in config.components() if name not in target.components()]
        present = {n for n, c in config.components().items() if not c.keys().keys().isdisjoint(planned.outputs[0])}
        sources += [(config, pick(delta, name)) for name in others if name in present]
    for layout, node in sources:
        parts = {key: name for name, component in layout.components().items() for key in component.keys()}  # noqa: SIM118
        for key, tensor in stream(node, **options):
            yield *_named(style, layout, parts.get(key, "keys"), key), key, tensor


def _inputs(delta: RecipeNode) -> str:
    return " and ".join(dict.fromkeys(node.label() for node in toposort(delta) if isinstance(node, ModelRecipeNode)))


def _named(style: Style, layout: ModelConfig, component: str, key: str) -> tuple[str | None, str]:
    """Module and parameter of a key."""
    for ending in (_WEIGHT, _BIAS):
        if key.endswith(ending):
            return style.module(layout, component, key.removesuffix(ending)), ending[1:]
    known = layout.identifier != "structural"
    return (None if known else style.module(layout, component, key)), "weight"


def _add_lokr(
    made: Adapter, module: str, delta: Tensor, rule: RankRule | None, ratio: float, how: tuple[bool, int, int]
) -> None:
    randomized, iters, seed = how
    matrix = delta.flatten(1)
    kernel = tuple(delta.shape[2:])
    shape = factor_shape(delta.shape[0], delta.shape[1], math.prod(kernel), ratio)
    # without a seed the basis has vectors to spare, and is as fixed
    w1, w2 = kronecker_factors(matrix, shape, randomized, iters, None if seed == 0 else seed, {})
    made.put(f"{module}.lokr_w1", w1.cpu())
    if rule is None:
        made.put(f"{module}.lokr_w2", w2.cpu().reshape(w2.shape[0], -1, *kernel))
        alpha = 1.0  # for programs that insist on one: two whole factors have no rank that it could be relative to
        second = w2.cpu().to(made.dtype).to(w2.dtype)
    else:
        up, down = low_rank(w2, rule, math.prod(kernel) > 1, randomized=randomized, iters=iters, seed=seed)
        rows, columns = up.cpu().to(made.dtype), down.cpu().to(made.dtype)
        made.put(f"{module}.lokr_w2_a", rows)
        made.put(f"{module}.lokr_w2_b", columns)
        alpha = float(up.shape[1])
        made.ranks[module] = up.shape[1]
        second = rows.to(w2.dtype) @ columns.to(w2.dtype)
    if made.alphas:
        made.put(f"{module}.alpha", torch.tensor(alpha))
    first = w1.cpu().to(made.dtype).to(w1.dtype)
    made.measure(module, matrix.cpu(), torch.kron(first, second))


def _nothing(left: list[str], diffs: bool) -> str:
    if not left:
        return "the models do not differ: there is nothing to extract; check that they are two different models"
    hint = "" if diffs else "; diffs=True stores biases and norms"
    return f"the models differ only where an adapter has no place, such as in {left[0]!r}{hint}"
