"""Stable Diffusion XL.

- `sdxl-sgm`: the original layout.
- `sdxl-kohya`, `sdxl-kohya_but_diffusers`: the names that LoRA files refer to, by whether the layers of the UNet
  are named as in the original layout or as in diffusers.
- `sdxl-diffusers_unet_only`: the UNet alone, as diffusers stores it.
"""

from __future__ import annotations

from functools import partial

import torch

from sd_mecha.builtin.configs.unet import SDXL, SDXL_DEPTHS, build
from sd_mecha.builtin.layers.basic import linear, nest
from sd_mecha.builtin.layers.components import (
    DIFFUSERS_UNET_SIGNS,
    Keys,
    checkpoint_signs,
    component,
    kohya_signs,
    noise_schedule,
)
from sd_mecha.builtin.layers.diffusers_names import diffusers_unet
from sd_mecha.builtin.layers.images import vae
from sd_mecha.builtin.layers.text_encoders import CLIP_TOKENS, clip_text, open_clip_text
from sd_mecha.extensions.model_configs import BuiltModelConfig, KeyMetadata, register

# images are made from the output of the last but one layer, so that files may lack the last one
_CLIP_L_LAYERS, _CLIP_L_LAST = 12, "encoder.layers.11."
_CLIP_G_LAYERS = 32
_CLIP_G = {"width": 1280, "layers": _CLIP_G_LAYERS}


def sdxl_sgm() -> dict[str, Keys]:
    """Return the components of Stable Diffusion XL."""
    clip_l = "conditioner.embedders.0.transformer.text_model."
    unused = (f"transformer.resblocks.{_CLIP_G_LAYERS - 1}.", "ln_final.", "logit_scale", "text_projection")
    return {
        "clip_l": _clip_l(clip_l, optional=(_CLIP_L_LAST, "final_layer_norm.")),
        "clip_g": clip_g("conditioner.embedders.1.model.", optional=unused),
        "vae": component("first_stage_model.", vae(latent=4)),
        "diffuser": {
            "edm_vpred.sigma_max": KeyMetadata((), torch.float32, optional=True),
            "edm_vpred.sigma_min": KeyMetadata((), torch.float32, optional=True),
            **component("model.diffusion_model.", build(SDXL, SDXL_DEPTHS)),
            # empty tensors that tell by being there how the model was trained
            "v_pred": KeyMetadata((0,), torch.int64, optional=True),
            "ztsnr": KeyMetadata((0,), torch.int64, optional=True),
        },
        "scheduler": noise_schedule(),
    }


def clip_g(prefix: str, optional: tuple[str, ...] = ()) -> Keys:
    """Return the larger text encoder as OpenCLIP names it.

    Args:
        prefix: where it stands in the checkpoint.
        optional: beginnings of the keys, below the prefix, that a model may lack.
    """
    return component(prefix, open_clip_text(**_CLIP_G), optional=optional)


def sdxl_kohya(*, diffusers: bool) -> dict[str, Keys]:
    """Return the components of Stable Diffusion XL by the names of kohya-ss.

    Args:
        diffusers: whether the UNet has the names and the usual dtype of diffusers.
    """
    projected = nest({"text_model": clip_text(**_CLIP_G), "text_projection": linear(1280, 1280, bias=False)})
    unused = (f"text_model.encoder.layers.{_CLIP_G_LAYERS - 1}.",)
    return {
        "vae": component("first_stage_model.", vae(latent=4)),
        "clip_l": _clip_l("te1.text_model.", optional=(_CLIP_L_LAST,)),
        "clip_g": component("te2.", projected, optional=unused),
        "diffuser": _diffusers_unet("unet.") if diffusers else component("unet.", build(SDXL, SDXL_DEPTHS)),
    }


def _diffusers_unet(prefix: str = "") -> Keys:
    return component(prefix, diffusers_unet(build(SDXL, SDXL_DEPTHS)), torch.float16)


def _clip_l(prefix: str, *, optional: tuple[str, ...]) -> Keys:
    keys = component(prefix, clip_text(width=768, layers=_CLIP_L_LAYERS), optional=optional)
    keys[f"{prefix}embeddings.position_ids"] = KeyMetadata((1, CLIP_TOKENS), torch.int64, optional=True)
    return {key: keys[key] for key in sorted(keys)}


def _diffusers_unet_only() -> dict[str, Keys]:
    return {"diffuser": _diffusers_unet()}


_SGM_SIGNS = checkpoint_signs("conditioner.embedders.", "edm_vpred.", "v_pred", "ztsnr")
_KOHYA_SIGNS = ("first_stage_model.", "te1.text_model.", "te2.text_")
register(BuiltModelConfig("sdxl-sgm", sdxl_sgm, _SGM_SIGNS))
for _name, _diffusers in {"sdxl-kohya": False, "sdxl-kohya_but_diffusers": True}.items():
    _built = partial(sdxl_kohya, diffusers=_diffusers)
    register(BuiltModelConfig(_name, _built, kohya_signs(*_KOHYA_SIGNS, diffusers=_diffusers)))
register(BuiltModelConfig("sdxl-diffusers_unet_only", _diffusers_unet_only, DIFFUSERS_UNET_SIGNS))
