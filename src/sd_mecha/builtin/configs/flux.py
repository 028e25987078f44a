"""Flux.1, and Chroma, in which a small network of its own makes the modulation of all blocks.

`flux-flux` is Flux.1 dev with its text encoders; the transformer is also published alone, without the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import flux as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, linear, nest
from sd_mecha.builtin.layers.components import Keys, below, component
from sd_mecha.builtin.layers.images import vae
from sd_mecha.builtin.layers.text_encoders import clip_text, t5_xxl
from sd_mecha.builtin.layers.transformers import (
    FREQUENCIES,
    double_block,
    embedder,
    final_layer,
    modulation,
    single_block,
)
from sd_mecha.extensions import layouts, translations
from sd_mecha.extensions.hyperparameters import count, flag, size, widens
from sd_mecha.extensions.model_configs import BuiltModelConfig, KeyMetadata, register

_MLP_RATIO = 4
_DOUBLE, _SINGLE, _GUIDE = "double_blocks.*", "single_blocks.*", "distilled_guidance_layer"


@dataclass(frozen=True)
class Flux1:
    """Sizes of a Flux.1."""

    width: int = size(f"{_SINGLE}.linear1.weight", 1, f"{_DOUBLE}.img_attn.qkv.weight", f"{_DOUBLE}.img_mod.lin.weight")
    head: int = size(f"{_SINGLE}.norm.query_norm.scale", 0, f"{_DOUBLE}.img_attn.norm.key_norm.scale")
    double: int = count("double_blocks")
    single: int = count("single_blocks")
    inputs: int = size("img_in.weight", 1)
    outputs: int = size("final_layer.linear.weight", 0, "final_layer.linear.bias")
    context: int = size("txt_in.weight", 1)
    pooled: int = size("vector_in.in_layer.weight", 1)
    guided: int = flag("guidance_in.in_layer.weight", "guidance_in.out_layer.weight", "guidance_in.in_layer.bias")


@dataclass(frozen=True)
class Chroma:
    """Sizes of a Chroma.

    Attributes:
        guide, layers, conditions: channels and layers of the network that makes the modulation, channels of what it
            makes it of.
    """

    width: int = size(f"{_SINGLE}.linear1.weight", 1, f"{_DOUBLE}.img_attn.qkv.weight")
    head: int = size(f"{_SINGLE}.norm.query_norm.scale", 0, f"{_DOUBLE}.img_attn.norm.key_norm.scale")
    double: int = count("double_blocks")
    single: int = count("single_blocks")
    channels: int = size("img_in.weight", 1, ("final_layer.linear.weight", 0), ("final_layer.linear.bias", 0))
    context: int = size("txt_in.weight", 1)
    guide: int = size(f"{_GUIDE}.layers.*.in_layer.weight", 1, f"{_GUIDE}.layers.*.out_layer.weight")
    layers: int = count(f"{_GUIDE}.layers", f"{_GUIDE}.norms")
    conditions: int = size(f"{_GUIDE}.in_proj.weight", 1)


def _blocks(h: Flux1 | Chroma) -> tuple[Shapes, Shapes]:
    """The blocks without modulation."""
    inner = _MLP_RATIO * h.width
    return double_block(h.width, h.head, inner), single_block(h.width, h.head, inner)


def build(h: Flux1) -> Shapes:
    """Return the keys of Flux.1 in the original layout."""
    width = h.width
    double, single = _blocks(h)
    double |= nest({f"{side}_mod.lin": modulation(width, width, 6) for side in ("img", "txt")})
    single |= nest({"modulation.lin": modulation(width, width, 3)})
    return nest(
        {
            "img_in": linear(width, h.inputs),
            "txt_in": linear(width, h.context),
            "time_in": embedder(width, FREQUENCIES),
            "vector_in": embedder(width, h.pooled),
            **({"guidance_in": embedder(width, FREQUENCIES)} if h.guided else {}),
            **{f"double_blocks.{i}": double for i in range(h.double)},
            **{f"single_blocks.{i}": single for i in range(h.single)},
            "final_layer": final_layer(width, h.outputs),
        }
    )


def build_chroma(h: Chroma) -> Shapes:
    """Return the keys of Chroma in the original layout."""
    double, single = _blocks(h)
    return nest(
        {
            "img_in": linear(h.width, h.channels),
            "txt_in": linear(h.width, h.context),
            f"{_GUIDE}.in_proj": linear(h.guide, h.conditions),
            **{f"{_GUIDE}.layers.{i}": embedder(h.guide, h.guide) for i in range(h.layers)},
            **{f"{_GUIDE}.norms.{i}.scale": (h.guide,) for i in range(h.layers)},
            f"{_GUIDE}.out_proj": linear(h.width, h.guide),
            **{f"double_blocks.{i}": double for i in range(h.double)},
            **{f"single_blocks.{i}": single for i in range(h.single)},
            "final_layer.linear": linear(h.channels, h.width),
        }
    )


_DEV = Flux1(3072, 128, 19, 38, 64, 64, 4096, 768, 1)


def flux_flux() -> dict[str, Keys]:
    """Return the components of Flux.1 dev."""
    diffuser = component(transformer_family.PREFIX, build(_DEV), torch.bfloat16, alias_prefix="")
    return {"diffuser": diffuser, **companions()}


def companions() -> dict[str, Keys]:
    """Return the text encoders and the autoencoder of Flux.1."""
    return {
        "clip_l": component("text_encoders.clip_l.transformer.text_model.", clip_text(width=768, layers=12)),
        "t5xxl": component("text_encoders.t5xxl.transformer.", t5_xxl()),
        "vae": component("vae.", vae(latent=16, quantized=False)),
    }


def others(h: Flux1) -> dict[str, Keys]:
    """Return what all-in-one files hold besides the network."""
    parts = companions()
    optional = {
        "clip_l": {"logit_scale": (), "transformer.text_projection.weight": (768, 768)},
        "t5xxl": {"logit_scale": (), "transformer.encoder.embed_tokens.weight": (32128, 4096)},
    }
    for name, shapes in optional.items():
        for key, shape in shapes.items():
            parts[name][f"text_encoders.{name}.{key}"] = KeyMetadata(shape, torch.float32, optional=True)
    return parts


_INPUTS = ("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.")
_NETWORK = ("double_blocks.", "single_blocks.", *_INPUTS, "final_layer.")
_SIGNS = (*below(transformer_family.PREFIX, _NETWORK), *_NETWORK, "text_encoders.", "vae.decoder.", "vae.encoder.")
register(BuiltModelConfig("flux-flux", flux_flux, _SIGNS))
transformer_family.register(
    "flux1",
    {
        "flux1_dev": _DEV,
        "flux1_schnell": Flux1(3072, 128, 19, 38, 64, 64, 4096, 768, 0),
        "flux1_fill_dev": Flux1(3072, 128, 19, 38, 384, 64, 4096, 768, 1),
    },
    build=build,
    signs=("double_blocks.*.img_mod.lin.weight", "double_blocks.*.txt_mod.lin.weight"),
    check=widens(_MLP_RATIO, f"{_DOUBLE}.img_mlp.2.weight", f"{_DOUBLE}.txt_mlp.2.weight"),
    rules=lambda h: rules.flux1(h.width, _MLP_RATIO * h.width),
    others=others,
    absent=[("flux1_dev", "original"), ("flux1_dev", "comfyui")],
    foreign=(
        "txt_in.individual_token_refiner.blocks.*.norm1.weight",
        "txt_in.input_embedder.weight",
        "context_embedder.token_refiner.refiner_blocks.*.norm1.weight",
        "context_embedder.token_refiner.refiner_blocks.*.norm2.weight",
    ),
)
transformer_family.register(
    "chroma",
    {"chroma1": Chroma(3072, 128, 19, 38, 64, 4096, 5120, 5, 64)},
    build=build_chroma,
    signs=tuple(
        f"{_GUIDE}.{name}" for name in ("layers.*.in_layer.weight", "layers.*.out_layer.weight", "norms.*.scale")
    ),
    rules=lambda h: rules.chroma(h.width, _MLP_RATIO * h.width),
)
translations.register(
    "flux-flux",
    "flux1_dev-diffusers",
    lambda: layouts.below(rules.flux1(_DEV.width, _MLP_RATIO * _DEV.width), transformer_family.PREFIX),
)
