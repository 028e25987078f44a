"""Parts of checkpoints as files of their own: UNets, autoencoders and text encoders.

Converting a checkpoint takes the part out of it, by its other names where it has any. Converting the part gives a
checkpoint that has nothing else, which `part | checkpoint` completes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from sd_mecha.builtin.configs.unet import SD1, SD_DEPTHS, SDXL, SDXL_DEPTHS
from sd_mecha.builtin.configs.unet import build as build_unet
from sd_mecha.builtin.configs.unet_families import PREFIX
from sd_mecha.builtin.conversions import autoencoders, text_encoders, unet
from sd_mecha.extensions import model_configs, translations
from sd_mecha.extensions.layouts import Rule, below, keep, prefixed

CHECKPOINTS = {
    "sd1": ("sd1-ldm", "sd1_inpaint-ldm", "sd1_pix2pix-ldm"),
    "sd2": ("sd2-ldm", "sd2_inpaint-ldm", "sd2_depth-ldm"),
    "sdxl": ("sdxl-sgm", "sdxl_inpaint-sgm", "sdxl_pix2pix-sgm"),
    "sdxl_refiner": ("sdxl_refiner-sgm",),
    "sd3": ("sd3-comfyui", "sd35_medium-comfyui", "sd35_large-comfyui"),
    "flux1": ("flux-flux", "flux1_schnell-comfyui", "flux1_fill_dev-comfyui"),
}
"""The configs of checkpoints by what they hold beside the network."""

VAES = {
    # where autoencoders stand, and which they are
    "sd1": ("first_stage_model.", "sd_vae"),
    "sd2": ("first_stage_model.", "sd_vae"),
    "sdxl": ("first_stage_model.", "sd_vae"),
    "sdxl_refiner": ("first_stage_model.", "sd_vae"),
    "sd3": ("first_stage_model.", "flux1_vae"),
    "flux1": ("vae.", "flux1_vae"),
}

ENCODERS = {
    # where text encoders stand by the names of transformers, and which they are
    "sd1": {"cond_stage_model.transformer.": "clip_l"},
    "sdxl": {"conditioner.embedders.0.transformer.": "clip_l"},
    "sd3": {f"text_encoders.{name}.transformer.": name for name in ("clip_l", "clip_g", "t5xxl")},
    "flux1": {f"text_encoders.{name}.transformer.": name for name in ("clip_l", "t5xxl")},
}

OPEN_CLIP = {
    # the same by the names of OpenCLIP
    "sd2": {"cond_stage_model.model.": "clip_h"},
    "sdxl": {"conditioner.embedders.1.model.": "clip_g"},
    "sdxl_refiner": {"conditioner.embedders.0.model.": "clip_g"},
}


def _same(prefix: str, part: str) -> list[Rule]:
    """The rules for a part that has the same names on its own."""
    names = {key.partition(".")[0] for key in model_configs.resolve(part).keys()}  # noqa: SIM118 (it is no mapping)
    return below(keep(*sorted(names - {"logit_scale"})), prefix)


def _vae(prefix: str, part: str) -> list[Rule]:
    return below(autoencoders.images(model_configs.resolve(part).keys()), prefix)


def _open_clip(prefix: str, part: str) -> list[Rule]:
    # the model that Stable Diffusion 2 uses has no projection in transformers
    rules = text_encoders.open_clip()
    return below((rule for rule in rules if part != "clip_h" or rule.source != "text_projection"), prefix)


def _unet(depths: tuple[int, ...], prefix: str) -> list[Rule]:
    h = SD1 if depths == SD_DEPTHS else SDXL
    return below(unet.unet(build_unet(h, depths)), prefix)


def _checkpoint(keys: Iterable[str]) -> list[Rule]:
    return prefixed(keys, PREFIX)


def _register() -> None:
    for kind, checkpoints in CHECKPOINTS.items():
        prefix, vae = VAES[kind]
        for checkpoint in checkpoints:
            translations.register(checkpoint, f"{vae}-original", partial(_same, prefix, f"{vae}-original"))
            translations.register(checkpoint, f"{vae}-diffusers", partial(_vae, prefix, f"{vae}-original"))
            for place, name in ENCODERS.get(kind, {}).items():
                encoder = f"{name}-transformers"
                translations.register(checkpoint, encoder, partial(_same, place, encoder))
            for place, name in OPEN_CLIP.get(kind, {}).items():
                translations.register(checkpoint, f"{name}-transformers", partial(_open_clip, place, name))
    translations.register("sd1-unet", "sd1-ldm", lambda: _checkpoint(build_unet(SD1, SD_DEPTHS)))
    translations.register("sd1-ldm", "sd1-diffusers", partial(_unet, SD_DEPTHS, PREFIX))
    translations.register("sdxl-unet", "sdxl-sgm", lambda: _checkpoint(build_unet(SDXL, SDXL_DEPTHS)))
    translations.register("sdxl-unet", "sdxl-diffusers_unet_only", partial(_unet, SDXL_DEPTHS, ""))


_register()
