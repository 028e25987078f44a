"""Shuffling the channels of a network so that it computes the same, and shuffling one back to fit another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.methods.assignment import best_match
from sd_mecha.builtin.methods.permutation_spec import Axis, Group, Runs, map_groups, permutable
from sd_mecha.builtin.methods.random_bits import draw_seed
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method

SDXL, SD1 = "sdxl-sgm", "sd1-ldm"


@merge_method(is_interface=True, default_factories={"seed": draw_seed})
def randperm(
    a: Parameter(StateDict[Tensor]),
    seed: Parameter(int) = None,
) -> Return(Tensor):
    """Shuffle the hidden channels of a model at random, in such a way that each layer fits the next again.

    Formula: for hidden channels `W1' = W1[p]`, `b1' = b1[p]`, `W2' = W2[:, p]`; queries with keys, and values
    with the projection that follows, likewise within each head. Other tensors stay. The attention of the UNet
    of Stable Diffusion XL is shuffled as in sd-mecha 1: within 64 runs of channels instead of within heads of
    64 channels. Some runs reach over two heads, so that this attention computes something else afterwards; all
    other layers compute the same.

    Args:
        a: a checkpoint of Stable Diffusion 1 (sd1-ldm) or XL (sdxl-sgm); its averages (`model_ema`) stay.
        seed: any integer; the same one gives the same permutations: number n of a model is `torch.randperm`
            of a generator with seed `seed + n`. Without one it is drawn when the recipe is made.

    Use when: testing whether a merge, such as `rebasin`, can cope with differences that mean nothing.
    Cost: whole tensors, two to four at a time; copies.
    Source: Ainsworth, Hayase & Srinivasa, arXiv 2209.04836.

    >>> [implementation.identifier for implementation, _ in randperm.interface.candidates]
    ['randperm_sdxl_sgm', 'randperm_sd1_ldm']
    """


@merge_method(is_interface=True)
def rebasin(
    a: Parameter(StateDict[Tensor]),
    ref: Parameter(StateDict[Tensor]),
    iters: Parameter(int) = 10,
) -> Return(StateDict[Tensor]):
    """Shuffle the hidden channels of a model to where the most similar channels of a reference model are.

    Formula: as `randperm`, with the p that maximises `sum_i <ref[i], a[p[i]]>` over all weights of channel i,
    for each p by itself. Where `randperm` shuffles within runs that are not heads, this matches within them.

    Args:
        a: the checkpoint whose channels are shuffled, of Stable Diffusion 1 (sd1-ldm) or XL (sdxl-sgm).
        ref: the checkpoint that it shall fit.
        iters: without effect: no permutation depends on another here, so that the first pass finds the best
            ones. Kept for recipes of sd-mecha 1, where it was the same.

    Use when: models without a common ancestor, or with a very remote one, shall be averaged: their channels
    may mean the same in another order. Merge `rebasin(a, b)` with b. Close fine-tunes of one model mostly stay
    as they are.
    Cost: whole tensors, two to four of each model at a time; a square matrix of scores for each permutation,
    and, where the best partners of two channels coincide, an assignment problem (needs scipy): seconds
    for each of the wide feed-forward layers.
    Source: Ainsworth, Hayase & Srinivasa, "Git Re-Basin", arXiv 2209.04836 (weight matching).

    >>> [implementation.identifier for implementation, _ in rebasin.interface.candidates]
    ['rebasin_sdxl_sgm', 'rebasin_sd1_ldm']
    """


class _ByGroup:
    @staticmethod
    def map_keys(builder: Any) -> None:
        map_groups(builder, permutable)


@merge_method(implements=randperm, default_factories={"seed": draw_seed})
class randperm_sdxl_sgm(_ByGroup):
    """Shuffle the hidden channels of a Stable Diffusion XL checkpoint; see `randperm`."""

    def __call__(
        self,
        a: Parameter(StateDict[Tensor], model_config=SDXL),
        seed: Parameter(int, model_config=SDXL) = None,
        **kwargs: Any,
    ) -> Return(StateDict[Tensor], model_config=SDXL):
        return _shuffled(a, seed, kwargs, SDXL)


@merge_method(implements=randperm, default_factories={"seed": draw_seed})
class randperm_sd1_ldm(_ByGroup):
    """Shuffle the hidden channels of a Stable Diffusion 1 checkpoint; see `randperm`."""

    def __call__(
        self,
        a: Parameter(StateDict[Tensor], model_config=SD1),
        seed: Parameter(int, model_config=SD1) = None,
        **kwargs: Any,
    ) -> Return(StateDict[Tensor], model_config=SD1):
        return _shuffled(a, seed, kwargs, SD1)


@merge_method(implements=rebasin)
class rebasin_sdxl_sgm(_ByGroup):
    """Shuffle a Stable Diffusion XL checkpoint to fit another; see `rebasin`."""

    def __call__(
        self,
        a: Parameter(StateDict[Tensor], model_config=SDXL),
        ref: Parameter(StateDict[Tensor], model_config=SDXL),
        iters: Parameter(int, model_config=SDXL) = 10,
        **kwargs: Any,
    ) -> Return(StateDict[Tensor], model_config=SDXL):
        return _aligned(a, ref, kwargs, SDXL)


@merge_method(implements=rebasin)
class rebasin_sd1_ldm(_ByGroup):
    """Shuffle a Stable Diffusion 1 checkpoint to fit another; see `rebasin`."""

    def __call__(
        self,
        a: Parameter(StateDict[Tensor], model_config=SD1),
        ref: Parameter(StateDict[Tensor], model_config=SD1),
        iters: Parameter(int, model_config=SD1) = 10,
        **kwargs: Any,
    ) -> Return(StateDict[Tensor], model_config=SD1):
        return _aligned(a, ref, kwargs, SD1)


def _shuffled(a: Mapping[str, Tensor], seed: int, context: Mapping[str, Any], config: str) -> dict[str, Tensor]:
    group = permutable(config).get(context["key"])
    return permuted(a, context["key_relation"].outputs, group, lambda runs: random_order(runs, seed))


def _aligned(
    a: Mapping[str, Tensor], ref: Mapping[str, Tensor], context: Mapping[str, Any], config: str
) -> dict[str, Tensor]:
    group = permutable(config).get(context["key"])
    return permuted(a, context["key_relation"].outputs, group, lambda runs: aligning_order(a, ref, runs))


def permuted(
    a: Mapping[str, Tensor], keys: tuple[str, ...], group: Group | None, order: Callable[[Runs], Tensor]
) -> dict[str, Tensor]:
    """The tensors of a group with their channels in another order.

    Args:
        a: where the tensors are.
        keys: which ones are wanted.
        group: what is shuffled; None where nothing is.
        order: gives, for runs of channels, which run and channel comes to which place: indices within each run,
            of shape (count, size).
    """
    tensors = {key: a[key] for key in keys}
    if group is None or any(tensor.is_meta for tensor in tensors.values()):
        return {key: tensor.clone() for key, tensor in tensors.items()}
    indices: dict[tuple[str, int], Tensor] = {}
    for runs in group.runs:
        within = order(runs)
        starts = torch.arange(runs.count, device=within.device) * runs.size
        channels = (within + starts[:, None]).flatten()
        for axis in runs.axes:
            tensor = tensors[axis.key]
            place = axis.key, axis.dim
            if place not in indices:
                indices[place] = torch.arange(tensor.shape[axis.dim], device=tensor.device)
            indices[place][axis.start : axis.start + len(channels)] = channels.to(tensor.device) + axis.start
    for (key, dim), index in indices.items():
        tensors[key] = tensors[key].index_select(dim, index)
    return tensors


def random_order(runs: Runs, seed: int) -> Tensor:
    """An independent random permutation for each run, by its number in the whole model."""
    generators = (torch.Generator().manual_seed((seed + number) % 2**64) for number in runs.numbers)
    return torch.stack([torch.randperm(runs.size, generator=generator) for generator in generators])


def aligning_order(a: Mapping[str, Tensor], ref: Mapping[str, Tensor], runs: Runs) -> Tensor:
    """For each channel of `ref` the one of `a` that is matched with it, such that the sum of products is largest."""
    scores: Tensor | None = None
    for axis in runs.axes:
        target, source = channels_of(ref[axis.key], axis, runs), channels_of(a[axis.key], axis, runs)
        dtype = torch.promote_types(torch.promote_types(target.dtype, source.dtype), torch.float32)
        product = target.to(dtype) @ source.to(dtype).mT
        scores = product if scores is None else scores.add_(product)
    assert scores is not None
    return torch.stack([best_match(of_run) for of_run in scores])


def channels_of(tensor: Tensor, axis: Axis, runs: Runs) -> Tensor:
    """The weights of each channel of each run, of shape (count, size, weights per channel)."""
    channels = tensor.narrow(axis.dim, axis.start, runs.count * runs.size).movedim(axis.dim, 0)
    return channels.reshape(runs.count, runs.size, -1)
