"""Cosmos Predict2: images from text, and videos from an image; no layer has a bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import cosmos as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, linear, nest, scale, unbiased
from sd_mecha.builtin.layers.transformers import two_layers
from sd_mecha.extensions.config_families import Keys
from sd_mecha.extensions.hyperparameters import count, size
from sd_mecha.extensions.model_configs import KeyMetadata

LATENT = 16
PATCH_SIZE = 4
MODULATION_RANK = 256
POSITIONS = {"seq": 240, "dim_spatial_range": 21, "dim_temporal_range": 22}
"""Buffers of the position embedding, which files may lack."""


@dataclass(frozen=True)
class Cosmos:
    """Sizes of a Cosmos Predict2.

    Attributes:
        channels: of the latent input and the mask of the padding; one more where frames are given.
    """

    width: int = size("blocks.*.adaln_modulation_mlp.1.weight", 1, "blocks.*.adaln_modulation_self_attn.1.weight")
    head: int = size("blocks.*.self_attn.q_norm.weight", 0, "blocks.*.self_attn.k_norm.weight")
    depth: int = count("blocks")
    channels: int = size("x_embedder.proj.1.weight", 1, per=PATCH_SIZE)
    context: int = size("blocks.*.cross_attn.k_proj.weight", 1, "blocks.*.cross_attn.v_proj.weight")


def build(h: Cosmos) -> Keys:
    """Return the keys in the original layout, without its prefix."""
    width = h.width
    block = nest(
        {
            "self_attn": _attention(h, width),
            "cross_attn": _attention(h, h.context),
            "mlp": two_layers("layer1", "layer2", width, width, 4 * width),
            **{f"adaln_modulation_{part}": _modulation(width, 3) for part in ("self_attn", "cross_attn", "mlp")},
        }
    )
    keys = nest(
        {
            "t_embedder.1.linear_1": linear(width, width),
            "t_embedder.1.linear_2": linear(3 * width, width),
            "x_embedder.proj.1": linear(width, PATCH_SIZE * h.channels),
            **{f"blocks.{i}": block for i in range(h.depth)},
            "final_layer.linear": linear(PATCH_SIZE * LATENT, width),
            "final_layer.adaln_modulation": _modulation(width, 2),
            "t_embedding_norm": scale(width),
        }
    )
    buffers = {f"pos_embedder.{k}": KeyMetadata((n,), torch.float32, optional=True) for k, n in POSITIONS.items()}
    return {**unbiased(keys), **buffers}


def _attention(h: Cosmos, context: int) -> Shapes:
    return nest(
        {
            "q_proj": linear(h.width, h.width),
            "q_norm": scale(h.head),
            "k_proj": linear(h.width, context),
            "k_norm": scale(h.head),
            "v_proj": linear(h.width, context),
            "output_proj": linear(h.width, h.width),
        }
    )


def _modulation(width: int, parts: int) -> Shapes:
    return two_layers("1", "2", parts * width, width, MODULATION_RANK)


transformer_family.register(
    "cosmospredict2",
    {
        "cosmos_predict2_2b_t2i": Cosmos(2048, 128, 28, LATENT + 1, 1024),
        "cosmos_predict2_2b_v2w": Cosmos(2048, 128, 28, LATENT + 2, 1024),
        "cosmos_predict2_14b_t2i": Cosmos(5120, 128, 36, LATENT + 1, 1024),
    },
    build=build,
    signs=("blocks.*.adaln_modulation_self_attn.1.weight", "blocks.*.adaln_modulation_mlp.1.weight"),
    rules=lambda h: rules.cosmos(),
    prefix="net.",
)
