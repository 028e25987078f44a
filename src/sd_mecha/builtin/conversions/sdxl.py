"""Stable Diffusion XL: between the original layout, the names of kohya-ss, and the UNet of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.conversions.text_encoders import open_clip
from sd_mecha.builtin.layers.diffusers_names import unet_name
from sd_mecha.extensions.layouts import RuleTable
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method

UNET = "model.diffusion_model."
CLIP_G = "conditioner.embedders.1.model."
SGM_PROJECTION = f"{CLIP_G}text_projection"
KOHYA_PROJECTION = "te2.text_projection.weight"
_OPEN_CLIP = RuleTable(open_clip())
_RENAMED = {
    "conditioner.embedders.0.transformer.text_model.": "te1.text_model.",
    "first_stage_model.": "first_stage_model.",
}


@merge_method(
    identifier="convert_'sdxl-diffusers_unet_only'_to_'sdxl-sgm'",
    is_conversion=True,
    tiling="select",
    reuse_outputs=False,
)
class convert_sdxl_diffusers_unet_to_sgm:
    """Give the UNet of Stable Diffusion XL as diffusers stores it the names of the original layout.

    Formula: `result[k] = diffusers_sd[name of k]`; there are no other keys than the UNet's.

    Args:
        diffusers_sd: a state dict of config `sdxl-diffusers_unet_only`.

    Use when: a UNet from a diffusers folder should be merged with checkpoints; `| checkpoint` adds the rest.
    Cost: none; bytes are copied.
    Source: the layouts of Stable Diffusion XL and diffusers.

    >>> unet_name("label_emb.0.2.bias")
    'add_embedding.linear_2.bias'
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            if key.startswith(UNET):
                builder[key] = builder.diffusers_sd.keys[unet_name(key.removeprefix(UNET))]

    def __call__(
        self, diffusers_sd: Parameter(StateDict[Tensor], model_config="sdxl-diffusers_unet_only"), **kwargs: Any
    ) -> Return(Tensor, model_config="sdxl-sgm"):
        return diffusers_sd[kwargs["key_relation"].inputs["diffusers_sd"][0]]


@merge_method(
    identifier="convert_'sdxl-sgm'_to_'sdxl-diffusers_unet_only'",
    is_conversion=True,
    tiling="select",
    reuse_outputs=False,
)
class convert_sdxl_sgm_to_diffusers_unet:
    """Take the UNet out of a Stable Diffusion XL checkpoint, by the names of diffusers.

    Formula: `result[name of k] = sgm_sd[k]` for the keys of the UNet.

    Args:
        sgm_sd: a state dict of config `sdxl-sgm`.

    Use when: the UNet is needed as diffusers stores it.
    Cost: none; bytes are copied.
    Source: the layouts of Stable Diffusion XL and diffusers.

    >>> unet_name("output_blocks.2.2.conv.weight")
    'up_blocks.0.upsamplers.0.conv.weight'
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.sgm_sd.keys():  # noqa: SIM118 (it is no mapping)
            if key.startswith(UNET):
                builder[unet_name(key.removeprefix(UNET))] = builder.sgm_sd.keys[key]

    def __call__(self, sgm_sd: Parameter(StateDict[Tensor], model_config="sdxl-sgm"), **kwargs: Any) -> Return(
        Tensor, model_config="sdxl-diffusers_unet_only"
    ):
        return sgm_sd[kwargs["key_relation"].inputs["sgm_sd"][0]]


def kohya_names(key: str, name_in_unet: Callable[[str], str]) -> tuple[str, ...]:
    """The keys of kohya-ss that hold what a key of `sdxl-sgm` holds; none for what only the original layout has.

    Args:
        key: a key of `sdxl-sgm`.
        name_in_unet: what a key of the UNet is called.

    >>> kohya_names("conditioner.embedders.1.model.ln_final.bias", unet_name)
    ('te2.text_model.final_layer_norm.bias',)
    """
    if key.startswith(CLIP_G):
        return tuple(f"te2.{name}" for name in _OPEN_CLIP.find(key.removeprefix(CLIP_G))[1])
    if key.startswith(UNET):
        return ("unet." + name_in_unet(key.removeprefix(UNET)),)
    return tuple(new + key.removeprefix(old) for old, new in _RENAMED.items() if key.startswith(old))


def _conversions_of_kohya(target: str, name_in_unet: Callable[[str], str]) -> None:
    """Declare the conversions between `sdxl-sgm` and one of the two layouts that kohya-ss names."""
    names = partial(kohya_names, name_in_unet=name_in_unet)

    @merge_method(identifier=f"convert_'{target}'_to_'sdxl-sgm'", is_conversion=True, reuse_outputs=False)
    class convert_kohya_to_sgm:
        """Give Stable Diffusion XL by the names of kohya-ss, such as what a LoRA changes, the original layout.

        Formula: `result[k] = kohya_sd[name of k]`. In the larger text encoder queries, keys and values are stacked,
        for which all three must be there, and the projection is transposed.

        Args:
            kohya_sd: a state dict by the names of kohya-ss.

        Use when: a LoRA should be added to a checkpoint; `sd_mecha.convert` finds it.
        Cost: whole tensor; a copy.
        Source: the layouts of Stable Diffusion XL, OpenCLIP and transformers.

        >>> kohya_names("model.diffusion_model.out.2.bias", unet_name)
        ('unet.conv_out.bias',)
        """

        @staticmethod
        def map_keys(builder: Any) -> None:
            for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
                if found := names(key):
                    builder[key] = builder.kohya_sd.keys[found]

        def __call__(self, kohya_sd: StateDict[Tensor], **kwargs: Any) -> Tensor:
            parts = list(kohya_sd.values())
            if len(parts) > 1:
                return torch.cat(parts)
            return _turned(parts[0]) if kwargs["key"] == SGM_PROJECTION else parts[0]

        # set here because names of this function cannot stand in the annotations above
        __call__.__annotations__ |= {
            "kohya_sd": Parameter(StateDict[Tensor], model_config=target),
            "return": Return(Tensor, model_config="sdxl-sgm"),
        }

    @merge_method(identifier=f"convert_'sdxl-sgm'_to_'{target}'", is_conversion=True, reuse_outputs=False)
    class convert_sgm_to_kohya:
        """Give Stable Diffusion XL of the original layout the names of kohya-ss, which those of LoRA files follow.

        Formula: `result[name of k] = sgm_sd[k]`. In the larger text encoder queries, keys and values are taken apart,
        and the projection is transposed.

        Args:
            sgm_sd: a state dict of config `sdxl-sgm`.

        Use when: a LoRA should be extracted from a checkpoint.
        Cost: whole tensor; a copy.
        Source: the layouts of Stable Diffusion XL, OpenCLIP and transformers.

        >>> kohya_names("conditioner.embedders.1.model.text_projection", unet_name)
        ('te2.text_projection.weight',)
        """

        @staticmethod
        def map_keys(builder: Any) -> None:
            for key in builder.sgm_sd.keys():  # noqa: SIM118 (it is no mapping)
                if found := names(key):
                    builder[found] = builder.sgm_sd.keys[key]

        def __call__(self, sgm_sd: StateDict[Tensor], **kwargs: Any) -> dict[str, Tensor]:
            outputs = kwargs["key_relation"].outputs
            (value,) = sgm_sd.values()
            if outputs == (KOHYA_PROJECTION,):
                value = _turned(value)
            parts = value.chunk(len(outputs)) if len(outputs) > 1 else (value,)
            return dict(zip(outputs, parts, strict=True))

        __call__.__annotations__ |= {
            "sgm_sd": Parameter(StateDict[Tensor], model_config="sdxl-sgm"),
            "return": Return(StateDict[Tensor], model_config=target),
        }


def _turned(projection: Tensor) -> Tensor:
    return projection.mT.contiguous()


_conversions_of_kohya("sdxl-kohya", str)
_conversions_of_kohya("sdxl-kohya_but_diffusers", unet_name)
