"""Stable Diffusion 1: between the original layout and the names of kohya-ss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sd_mecha.builtin.adapters.common import fitted
from sd_mecha.builtin.layers.diffusers_names import unet_name, vae_name
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method


@merge_method(identifier="convert_'sd1-kohya'_to_'sd1-ldm'", is_conversion=True, tiling="rows", reuse_outputs=False)
class convert_sd1_kohya_to_ldm:
    """Give Stable Diffusion 1 by the names of kohya-ss, such as what a LoRA changes, the original layout.

    Formula: `result[k] = kohya_sd[name of k]`; the matrices of the autoencoder's attention become 1x1 kernels.

    Args:
        kohya_sd: a state dict of config `sd1-kohya`.

    Use when: a LoRA should be added to a checkpoint; `sd_mecha.convert` finds it.
    Cost: none; a copy.
    Source: the layouts of Stable Diffusion and diffusers.

    >>> kohya_name("model.diffusion_model.input_blocks.0.0.weight")
    'unet.conv_in.weight'
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            if name := kohya_name(key):
                builder[key] = builder.kohya_sd.keys[name]

    def __call__(self, kohya_sd: Parameter(StateDict[Tensor], model_config="sd1-kohya"), **kwargs: Any) -> Return(
        Tensor, model_config="sd1-ldm"
    ):
        return _renamed(kohya_sd, "sd1-ldm", kwargs)


@merge_method(identifier="convert_'sd1-ldm'_to_'sd1-kohya'", is_conversion=True, tiling="rows", reuse_outputs=False)
class convert_sd1_ldm_to_kohya:
    """Give Stable Diffusion 1 of the original layout the names of kohya-ss, which those of LoRA files follow.

    Formula: `result[name of k] = ldm_sd[k]`; the 1x1 kernels of the autoencoder's attention become matrices. The
    averages and the noise schedule have no place there.

    Args:
        ldm_sd: a state dict of config `sd1-ldm`.

    Use when: a LoRA should be extracted from a checkpoint.
    Cost: none; a copy.
    Source: the layouts of Stable Diffusion and diffusers.

    >>> kohya_name("first_stage_model.decoder.mid.attn_1.q.weight")
    'vae.decoder.mid_block.attentions.0.to_q.weight'
    """

    @staticmethod
    def map_keys(builder: Any) -> None:
        for key in builder.ldm_sd.keys():  # noqa: SIM118 (it is no mapping)
            if name := kohya_name(key):
                builder[name] = builder.ldm_sd.keys[key]

    def __call__(self, ldm_sd: Parameter(StateDict[Tensor], model_config="sd1-ldm"), **kwargs: Any) -> Return(
        Tensor, model_config="sd1-kohya"
    ):
        return _renamed(ldm_sd, "sd1-kohya", kwargs)


def kohya_name(key: str) -> str | None:
    """What kohya-ss calls a key of `sd1-ldm`, None for what only the original layout has."""
    text, unet, vae = "cond_stage_model.transformer.", "model.diffusion_model.", "first_stage_model."
    if key.startswith(text) and not key.endswith("position_ids"):
        return "te." + key.removeprefix(text)
    if key.startswith(unet):
        return "unet." + unet_name(key.removeprefix(unet))
    if key.startswith(vae):
        return "vae." + vae_name(key.removeprefix(vae))
    return None


def _renamed(source: StateDict[Tensor], target: str, context: dict[str, Any]) -> Tensor:
    (value,) = source.values()
    shape = model_configs.resolve(target).keys()[context["key"]].shape
    assert shape is not None
    # pieces have as many dimensions as the tensor that they are cut from
    return fitted(value, shape) if value.dim() != len(shape) else value
