"""Block weights to keys: one number per block of a UNet, as in block-weighted merging, for every key."""

from __future__ import annotations

import re
from typing import Any

from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, T, merge_method

_NUMBERED = re.compile(r"model\.diffusion_model\.(input|output)_blocks\.(\d+)\.")
_NAMES = {"input": "IN", "output": "OUT"}


@merge_method(tiling="select", reuse_outputs=False, is_conversion=True)
class convert_sd1_blocks_to_ldm:
    """Give every key of a Stable Diffusion 1 checkpoint the value of its block.

    Formula: `result[k] = blocks[block of k]`: IN00 to IN11, M00, OUT00 to OUT11 (with the output layer), BASE
    for all else.

    Args:
        blocks: a literal of config `sd1-supermerger_blocks`, for instance `{"BASE": 0.1, "IN00": 0.9, ...}`.

    Use when: `weighted_sum(a, b, alpha=sd_mecha.convert(blocks, a))` should weigh blocks differently.
    Cost: none.
    Source: block-weighted merging of the image-model merging community.

    >>> block_of("model.diffusion_model.output_blocks.3.0.in_layers.0.weight", last_block="OUT11")
    'OUT03'
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            builder[key] = builder.blocks.keys[block_of(key, last_block="OUT11")]

    def __call__(self, blocks: Parameter(StateDict[T], model_config="sd1-supermerger_blocks"), **kwargs: Any) -> Return(
        T, model_config="sd1-ldm"
    ):
        (key,) = kwargs["key_relation"].inputs["blocks"]
        return blocks[key]


@merge_method(tiling="select", reuse_outputs=False, is_conversion=True)
class convert_sdxl_blocks_to_sgm:
    """Give every key of a Stable Diffusion XL checkpoint the value of its block.

    Formula: `result[k] = blocks[block of k]`: IN00 to IN08, M00, OUT00 to OUT08 (with the output layer), VAE, BASE
    for all else.

    Args:
        blocks: a literal of config `sdxl-supermerger_blocks`, for instance `{"BASE": 0.1, "IN00": 0.9, ...}`.

    Use when: `weighted_sum(a, b, alpha=sd_mecha.convert(blocks, a))` should weigh blocks differently.
    Cost: none.
    Source: block-weighted merging of the image-model merging community.

    >>> block_of("model.diffusion_model.out.2.bias", last_block="OUT08", has_vae_block=True)
    'OUT08'
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            builder[key] = builder.blocks.keys[block_of(key, last_block="OUT08", has_vae_block=True)]

    def __call__(
        self, blocks: Parameter(StateDict[T], model_config="sdxl-supermerger_blocks"), **kwargs: Any
    ) -> Return(T, model_config="sdxl-sgm"):
        (key,) = kwargs["key_relation"].inputs["blocks"]
        return blocks[key]


def block_of(key: str, last_block: str, has_vae_block: bool = False) -> str:
    """The block that a key of an original-layout checkpoint belongs to.

    Args:
        key: the key, for instance `model.diffusion_model.input_blocks.0.0.weight`.
        last_block: the block that the output layer `model.diffusion_model.out` counts to.
        has_vae_block: whether the autoencoder is a block of its own rather than part of BASE.

    >>> block_of("first_stage_model.quant_conv.bias", last_block="OUT08", has_vae_block=True)
    'VAE'
    """
    if numbered := _NUMBERED.match(key):
        return f"{_NAMES[numbered[1]]}{int(numbered[2]):02}"
    if key.startswith("model.diffusion_model.middle_block."):
        return "M00"
    if key.startswith("model.diffusion_model.out."):
        return last_block
    return "VAE" if has_vae_block and key.startswith("first_stage_model.") else "BASE"
