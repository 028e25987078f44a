"""Stable Diffusion 1.

- `sd1-ldm`: the original layout, with the averages that training leaves.
- `sd1-kohya`: the names that LoRA files of kohya-ss refer to, which are those of diffusers.
"""

from __future__ import annotations

import torch

from sd_mecha.builtin.configs.unet import SD1, SD_DEPTHS, build
from sd_mecha.builtin.layers.components import Keys, averages, checkpoint_signs, component, kohya_signs, noise_schedule
from sd_mecha.builtin.layers.diffusers_names import diffusers_unet, diffusers_vae
from sd_mecha.builtin.layers.images import vae
from sd_mecha.builtin.layers.text_encoders import CLIP_TOKENS, clip_text
from sd_mecha.extensions.model_configs import BuiltModelConfig, KeyMetadata, register


def sd1_ldm() -> dict[str, Keys]:
    """Return the components of Stable Diffusion 1."""
    diffuser = build(SD1, SD_DEPTHS)
    return {
        "clip_l": text_encoder(),
        "vae": component("first_stage_model.", vae(latent=4)),
        "diffuser": component("model.diffusion_model.", diffuser),
        "ema": averages(diffuser),
        "scheduler": noise_schedule(),
    }


def sd1_kohya() -> dict[str, Keys]:
    """Return the components of Stable Diffusion 1 by the names of kohya-ss."""
    return {
        "clip_l": component("te.text_model.", clip_text(width=768, layers=12)),
        "diffuser": component("unet.", diffusers_unet(build(SD1, SD_DEPTHS))),
        "vae": component("vae.", diffusers_vae(vae(latent=4))),
    }


def text_encoder() -> Keys:
    """Return the text encoder in the original layout."""
    prefix = "cond_stage_model.transformer."
    keys = {
        key: KeyMetadata(shape, torch.float32, (prefix + key,))
        for key, shape in clip_text(width=768, layers=12).items()
    }
    positions = "embeddings.position_ids"
    keys[positions] = KeyMetadata((1, CLIP_TOKENS), torch.int64, (prefix + positions,), optional=True)
    return {f"{prefix}text_model.{key}": keys[key] for key in sorted(keys)}


_AUTOENCODER = ("vae.decoder.", "vae.encoder.", "vae.quant_conv.", "vae.post_quant_conv.")
_LDM_SIGNS = checkpoint_signs("cond_stage_model.transformer.", "model_ema.")
register(BuiltModelConfig("sd1-ldm", sd1_ldm, _LDM_SIGNS))
register(BuiltModelConfig("sd1-kohya", sd1_kohya, kohya_signs("te.text_model.", *_AUTOENCODER, diffusers=True)))
