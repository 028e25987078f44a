"""Stable Diffusion 1, 2 and XL with their variants: as checkpoints, and the UNet alone in two layouts.

`sd1-ldm`, `sdxl-sgm` and `sdxl-diffusers_unet_only` are configs of their own and stand for the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sd_mecha.builtin.configs import unet
from sd_mecha.builtin.configs.sd1 import text_encoder
from sd_mecha.builtin.configs.sdxl import clip_g, sdxl_sgm
from sd_mecha.builtin.configs.unet import SD1, SD_DEPTHS, SDXL, UNet, build
from sd_mecha.builtin.conversions import unet as rules
from sd_mecha.builtin.layers.components import averages, component, noise_schedule
from sd_mecha.builtin.layers.images import vae
from sd_mecha.builtin.layers.text_encoders import CLIP_TOKENS, open_clip_text
from sd_mecha.extensions.config_families import Family, Keys, Layout, translated
from sd_mecha.extensions.layouts import Rule, prefixed
from sd_mecha.extensions.model_configs import KeyMetadata, register_family

PREFIX = "model.diffusion_model."
Companions = Callable[[UNet], Mapping[str, Keys]]


def sd_companions(h: UNet) -> Mapping[str, Keys]:
    """Return what checkpoints of Stable Diffusion 1 and 2 hold besides the UNet."""
    parts: dict[str, Keys] = {
        "vae": component("first_stage_model.", vae(latent=4)),
        "ema": averages(build(h, SD_DEPTHS)),
        "scheduler": noise_schedule(),
    }
    if h.context == SD1.context:
        parts["clip_l"] = text_encoder()
    elif h.context == 1024:
        # old files hold the table that hides later tokens
        shapes = {**open_clip_text(width=1024, layers=24), "attn_mask": (CLIP_TOKENS, CLIP_TOKENS)}
        parts["clip_h"] = component("cond_stage_model.model.", shapes, optional=("attn_mask",))
    return parts


def sdxl_companions(h: UNet) -> Mapping[str, Keys]:
    """Return what checkpoints of Stable Diffusion XL hold besides the UNet."""
    return {
        name: {key: metadata for key, metadata in keys.items() if not key.startswith(PREFIX)}
        for name, keys in sdxl_sgm().items()
    }


def refiner_companions(h: UNet) -> Mapping[str, Keys]:
    """Return what checkpoints of the refiner of Stable Diffusion XL hold besides the UNet."""
    return {
        "clip_g": clip_g("conditioner.embedders.0.model."),
        "vae": component("first_stage_model.", vae(latent=4)),
        "scheduler": {"denoiser.sigmas": KeyMetadata((1000,), torch.float32, optional=True)} | noise_schedule(),
    }


def _register(
    name: str,
    depths: tuple[int, ...],
    variants: Mapping[str, UNet],
    checkpoint: str,
    companions: Companions,
    absent: tuple[tuple[str, str], ...] = (),
    alone: Companions = lambda h: {},
    labels: str = "add_embedding",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Register the checkpoint, the UNet alone, and the UNet as diffusers stores it.

    Args:
        name, variants, absent: see `Family`.
        depths: transformer blocks per residual block for each level.
        checkpoint: what the layout of checkpoints is called.
        companions: what else they hold.
        alone: what else files of the UNet alone may hold.
        labels: what diffusers calls the layers that further conditions go through.
        dtype: in which the tensors are published.
    """

    def diffuser(h: UNet) -> Mapping[str, Keys]:
        return {"diffuser": build(h, depths)}

    def below(h: UNet) -> list[Rule]:
        return prefixed(build(h, depths), PREFIX)

    def there(h: UNet) -> list[Rule]:
        return rules.unet(build(h, depths), labels)

    read = unet.reader(depths)
    layouts = {
        "unet": Layout(diffuser, unet.SIGNS, read, dtype=dtype, others=alone),
        checkpoint: Layout(diffuser, unet.SIGNS, read, PREFIX, dtype, companions),
        "diffusers": Layout(translated(diffuser, there), unet.SIGNS_THERE, read, dtype=dtype),
    }
    ways = {("unet", checkpoint): below, ("unet", "diffusers"): there}
    register_family(Family(name, UNet, variants, layouts, ways, absent))


_register(
    "sd",
    SD_DEPTHS,
    {
        "sd1": SD1,
        "sd1_inpaint": UNet(9, 320, 768, 0, 0),
        "sd1_pix2pix": UNet(8, 320, 768, 0, 0),
        "sd2": UNet(4, 320, 1024, 0, 1),
        "sd2_inpaint": UNet(9, 320, 1024, 0, 1),
        "sd2_depth": UNet(5, 320, 1024, 0, 1),
    },
    "ldm",
    sd_companions,
    absent=(("sd1", "ldm"),),
    alone=lambda h: {"ema": averages(build(h, SD_DEPTHS), "")},
    labels="class_embedding",
    dtype=torch.float32,
)
_register(
    "sdxl",
    unet.SDXL_DEPTHS,
    {"sdxl": SDXL, "sdxl_inpaint": UNet(9, 320, 2048, 2816, 1), "sdxl_pix2pix": UNet(8, 320, 2048, 2816, 1)},
    "sgm",
    sdxl_companions,
    absent=(("sdxl", "sgm"), ("sdxl", "diffusers")),
)
_register("sdxlrefiner", unet.REFINER_DEPTHS, {"sdxl_refiner": UNet(4, 384, 1280, 2560, 1)}, "sgm", refiner_companions)
