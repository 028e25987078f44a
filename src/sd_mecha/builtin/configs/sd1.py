"""`sd1-ldm`: Stable Diffusion 1 in the original layout, with the averages that training leaves."""

from __future__ import annotations

import torch

from sd_mecha.builtin.configs.layers import Shapes, clip_text, unet, vae
from sd_mecha.extensions.model_configs import BuiltModelConfig, KeyMetadata, register

Keys = dict[str, KeyMetadata]

_SCHEDULE = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
_STEPS = 1000
_TOKENS = 77


def sd1_ldm() -> dict[str, Keys]:
    """Return the components of Stable Diffusion 1."""
    diffuser = unet(latent=4, base=320, widths=(1, 2, 4, 4), depths=(1, 1, 1, 0), context=768)
    return {
        "clip_l": _text_encoder(),
        "vae": _plain("first_stage_model.", vae(latent=4, base=128, widths=(1, 2, 4, 4))),
        "diffuser": _plain("model.diffusion_model.", diffuser),
        "ema": _averages(diffuser),
        "scheduler": {key: KeyMetadata((_STEPS,), torch.float32, optional=True) for key in _SCHEDULE},
    }


def _plain(prefix: str, shapes: Shapes) -> Keys:
    return {prefix + key: KeyMetadata(shapes[key], torch.float32) for key in sorted(shapes)}


def _text_encoder() -> Keys:
    prefix = "cond_stage_model.transformer."
    shapes = clip_text(width=768, layers=12, tokens=_TOKENS)
    keys = {key: KeyMetadata(shape, torch.float32, (prefix + key,)) for key, shape in shapes.items()}
    positions = "embeddings.position_ids"
    keys[positions] = KeyMetadata((1, _TOKENS), torch.int64, (prefix + positions,), optional=True)
    return {f"{prefix}text_model.{key}": keys[key] for key in sorted(keys)}


def _averages(diffuser: Shapes) -> Keys:
    """Moving averages of the UNet; their names were stripped of dots when they were made."""
    keys = {
        "model_ema.decay": KeyMetadata((), torch.float32, optional=True),
        "model_ema.num_updates": KeyMetadata((), torch.int32, optional=True),
    }
    for key in sorted(diffuser, key=lambda key: key.replace(".", "")):
        flat = key.replace(".", "")
        alias = f"model_ema.{flat}"
        keys[f"model_ema.diffusion_model{flat}"] = KeyMetadata(diffuser[key], torch.float32, (alias,), optional=True)
    return keys


register(BuiltModelConfig("sd1-ldm", sd1_ldm))
