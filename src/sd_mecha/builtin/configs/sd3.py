"""Stable Diffusion 3 and 3.5; `sd3-comfyui` is 3 medium with its text encoders, as ComfyUI saves it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import sd3 as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, conv, linear, nest, scale
from sd_mecha.builtin.layers.components import Keys, below, component
from sd_mecha.builtin.layers.images import vae
from sd_mecha.builtin.layers.text_encoders import clip_text, t5_xxl
from sd_mecha.builtin.layers.transformers import FREQUENCIES, final_layer, modulation, two_layers
from sd_mecha.extensions import translations
from sd_mecha.extensions.hyperparameters import count, read_by, size, widens
from sd_mecha.extensions.layouts import prefixed
from sd_mecha.extensions.model_configs import BuiltModelConfig, KeyMetadata, register

_MLP_RATIO = 4
_IMAGE, _TEXT = "joint_blocks.*.x_block", "joint_blocks.*.context_block"
_NORMS = (f"{_IMAGE}.attn.ln_q.weight", f"{_IMAGE}.attn.ln_k.weight")
_SECOND = tuple(f"{_IMAGE}.attn2.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias"))


@dataclass(frozen=True)
class SD3:
    """Sizes of a Stable Diffusion 3.

    Attributes:
        dual: number of blocks, from the first, in which the image also attends to itself alone.
        latent: channels of an encoded image.
        patch: side of the square of latent pixels that makes one token.
        positions: side of the square of tokens that has position embeddings.
    """

    depth: int = count("joint_blocks")
    width: int = size(f"{_IMAGE}.attn.qkv.weight", 1, f"{_TEXT}.attn.qkv.weight")
    head: int = read_by(lambda header: header.size(_NORMS[0], 0, _NORMS[1]) if header.has(*_NORMS) else 0)
    dual: int = read_by(lambda header: header.reach(*_SECOND))
    latent: int = size("x_embedder.proj.weight", 1)
    patch: int = size("x_embedder.proj.weight", 2)
    positions: int = read_by(lambda header: math.isqrt(header.size("pos_embed", 1)))
    context: int = size("context_embedder.weight", 1)
    pooled: int = size("y_embedder.mlp.0.weight", 1)


def build(h: SD3) -> Shapes:
    """Return the keys in the original layout; the last block leaves the text as it is."""
    width = h.width
    norms = nest(dict.fromkeys(("attn.ln_q", "attn.ln_k"), scale(h.head))) if h.head else {}
    attention = nest({"attn.qkv": linear(3 * width, width), "attn.proj": linear(width, width)})
    feed_forward = two_layers("mlp.fc1", "mlp.fc2", width, width, _MLP_RATIO * width)
    stream = attention | feed_forward | nest({"adaLN_modulation.1": modulation(width, width, 6)}) | norms
    second = {key.replace("attn.", "attn2.", 1): shape for key, shape in (attention | norms).items()}
    dual = stream | second | nest({"adaLN_modulation.1": modulation(width, width, 9)})
    last = nest({"attn.qkv": linear(3 * width, width), "adaLN_modulation.1": modulation(width, width, 2)}) | norms
    blocks: dict[str, Shapes] = {}
    for index in range(h.depth):
        blocks[f"joint_blocks.{index}.x_block"] = dual if index < h.dual else stream
        blocks[f"joint_blocks.{index}.context_block"] = stream if index + 1 < h.depth else last
    return nest(
        {
            "pos_embed": (1, h.positions * h.positions, width),
            "x_embedder.proj": conv(width, h.latent, h.patch, h.patch),
            "context_embedder": linear(width, h.context),
            "t_embedder": two_layers("mlp.0", "mlp.2", width, FREQUENCIES),
            "y_embedder": two_layers("mlp.0", "mlp.2", width, h.pooled),
            **blocks,
            "final_layer": final_layer(width, h.patch * h.patch * h.latent),
        }
    )


_MEDIUM = SD3(24, 1536, 0, 0, 16, 2, 192, 4096, 2048)


def sd3_comfyui() -> dict[str, Keys]:
    """Return the components of Stable Diffusion 3 medium."""
    network = nest({"diffusion_model": build(_MEDIUM), "model_sampling.sigmas": (1000,)})
    vae_keys, *encoders = companions().items()
    return dict([vae_keys, ("diffuser", component("model.", network)), *encoders])


def companions() -> dict[str, Keys]:
    """Return the autoencoder and the text encoders of Stable Diffusion 3."""
    encoders = {"clip_g": _projected_clip(1280, 32), "clip_l": _projected_clip(768, 12), "t5xxl": t5_xxl()}
    autoencoder = vae(latent=16, quantized=False)
    parts = {"vae": component("first_stage_model.", autoencoder)}
    for name, encoder in encoders.items():
        parts[name] = component(f"text_encoders.{name}.", nest({"logit_scale": (), "transformer": encoder}))
    return parts


def _projected_clip(width: int, layers: int) -> Shapes:
    projection = linear(width, width, bias=False)
    return nest({"text_model": clip_text(width=width, layers=layers), "text_projection": projection})


def others(h: SD3) -> dict[str, Keys]:
    """Return the autoencoder, and what only some files hold: text encoders and a table of noise levels."""
    parts = companions()
    parts["t5xxl"]["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = KeyMetadata((32128, 4096))
    parts["diffuser"] = {"model.model_sampling.sigmas": KeyMetadata((1000,))}
    for name, keys in parts.items():
        if name != "vae":
            parts[name] = {key: KeyMetadata(m.shape, torch.float32, optional=True) for key, m in keys.items()}
    return parts


_EMBEDDERS = ("pos_embed", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.")
_NETWORK = below(transformer_family.PREFIX, ("joint_blocks.", *_EMBEDDERS, "final_layer."))
_SIGNS = (*_NETWORK, "model.model_sampling.", "first_stage_model.", "text_encoders.")
register(BuiltModelConfig("sd3-comfyui", sd3_comfyui, _SIGNS))
transformer_family.register(
    "sd3",
    {
        "sd3_medium": _MEDIUM,
        "sd35_medium": SD3(24, 1536, 64, 13, 16, 2, 384, 4096, 2048),
        "sd35_large": SD3(38, 2432, 64, 0, 16, 2, 192, 4096, 2048),
    },
    build=build,
    signs=(f"{_TEXT}.adaLN_modulation.1.weight", f"{_TEXT}.mlp.fc1.weight"),
    check=widens(_MLP_RATIO, f"{_IMAGE}.mlp.fc2.weight"),
    rules=lambda h: rules.mmdit(h.depth),
    others=others,
    absent=[("sd3_medium", "comfyui")],
    foreign=("single_transformer_blocks.*.attn.to_q.weight", "single_transformer_blocks.*.attn.to_k.weight"),
)
translations.register("sd3_medium-original", "sd3-comfyui", lambda: prefixed(build(_MEDIUM), transformer_family.PREFIX))
