"""Lumina-Image 2 and Z-Image: blocks over text and image alike, after a few that refine either of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import lumina as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import linear, nest, scale
from sd_mecha.builtin.layers.transformers import FREQUENCIES, gated_feed_forward
from sd_mecha.extensions.config_families import Keys
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.hyperparameters import count, read_by, size
from sd_mecha.extensions.model_configs import KeyMetadata

TIME = 1024
"""The most channels that the time has in Lumina; in Z-Image, those between its two layers."""

_BLOCK = "layers.*"
_QKV = f"{_BLOCK}.attention.qkv.weight"


@dataclass(frozen=True)
class ZImage:
    """Sizes of a Z-Image.

    Attributes:
        refiners: number of blocks over the text alone, and over the image alone.
    """

    width: int = size(_QKV, 1, f"{_BLOCK}.feed_forward.w1.weight")
    head: int = size(f"{_BLOCK}.attention.q_norm.weight", 0, f"{_BLOCK}.attention.k_norm.weight")
    inner: int = size(f"{_BLOCK}.feed_forward.w1.weight", 0, (f"{_BLOCK}.feed_forward.w2.weight", 1))
    depth: int = count("layers")
    refiners: int = count("noise_refiner", "context_refiner")
    channels: int = size("x_embedder.weight", 1, ("final_layer.linear.weight", 0), ("final_layer.linear.bias", 0))
    context: int = size("cap_embedder.1.weight", 1, ("cap_embedder.0.weight", 0))


def _shared(header: Header) -> int:
    rows, width = header.shape(_QKV, "context_refiner.*.attention.qkv.weight")
    return (rows - width) // 2


@dataclass(frozen=True)
class Lumina(ZImage):
    """Sizes of a Lumina-Image 2.

    Attributes:
        shared: channels of the keys and values, which several heads of the queries share.
    """

    shared: int = read_by(_shared)


def build_lumina(h: Lumina) -> Keys:
    """Return the keys of Lumina-Image 2 in the original layout."""
    time = min(h.width, TIME)
    return _network(h, h.shared, "adaLN_modulation.1", (time, time))


def build_z_image(h: ZImage) -> Keys:
    """Return the keys of Z-Image as ComfyUI stores it, which is the layout of Lumina."""
    tokens = {"x_pad_token": (1, h.width), "cap_pad_token": (1, h.width)}
    return {**tokens, **_network(h, h.width, "adaLN_modulation.0", (min(h.width, FREQUENCIES), TIME))}


def _network(h: ZImage, shared: int, modulation: str, time: tuple[int, int]) -> Keys:
    """The keys of either.

    Args:
        shared: channels of the keys and values.
        modulation: name of the layer that makes the modulation of a block.
        time: channels of the time, and between the two layers that make it.
    """
    width = h.width
    plain = nest(
        {
            "attention.qkv": linear(width + 2 * shared, width, bias=False),
            "attention.out": linear(width, width, bias=False),
            "attention.q_norm": scale(h.head),
            "attention.k_norm": scale(h.head),
            "feed_forward": gated_feed_forward(width, h.inner),
            **dict.fromkeys(("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"), scale(width)),
        }
    )
    modulated = plain | nest({modulation: linear(4 * width, time[0])})
    keys = nest(
        {
            "x_embedder": linear(width, h.channels),
            "t_embedder.mlp.0": linear(time[1], FREQUENCIES),
            "t_embedder.mlp.2": linear(time[0], time[1]),
            "cap_embedder.0": scale(h.context),
            "cap_embedder.1": linear(width, h.context),
            **{f"noise_refiner.{i}": modulated for i in range(h.refiners)},
            **{f"context_refiner.{i}": plain for i in range(h.refiners)},
            **{f"layers.{i}": modulated for i in range(h.depth)},
            "final_layer.linear": linear(h.channels, width),
            "final_layer.adaLN_modulation.1": linear(width, time[0]),
        }
    )
    # nothing uses it, but files have it
    return {**keys, "norm_final.weight": KeyMetadata((width,), torch.bfloat16, optional=True)}


transformer_family.register(
    "lumina2",
    {"lumina2": Lumina(2304, 96, 9216, 26, 2, 64, 2304, shared=768)},
    build=build_lumina,
    signs=("layers.*.adaLN_modulation.1.weight", "layers.*.adaLN_modulation.1.bias"),
    rules=lambda h: rules.lumina(h.width, h.shared),
)
transformer_family.register(
    "zimage",
    {"z_image": ZImage(3840, 128, 10240, 30, 2, 64, 2560)},
    build=build_z_image,
    signs=("layers.*.attention.qkv.weight",),
    check=lambda header: header.has(*(f"layers.*.adaLN_modulation.0.{kind}" for kind in ("weight", "bias"))),
    rules=lambda h: rules.z_image(),
)
