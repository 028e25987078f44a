"""Qwen-Image: blocks in which text and image have weights of their own and attend to each other.

Diffusers names the tensors as the original does, so there is no layout of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import linear, nest, scale
from sd_mecha.builtin.layers.transformers import FREQUENCIES, feed_forward, modulation, two_layers
from sd_mecha.extensions.config_families import Keys
from sd_mecha.extensions.hyperparameters import count, size
from sd_mecha.extensions.model_configs import KeyMetadata

_BLOCK = "transformer_blocks.*"


@dataclass(frozen=True)
class QwenImage:
    """Sizes of a Qwen-Image."""

    width: int = size(f"{_BLOCK}.img_mod.1.weight", 1, f"{_BLOCK}.txt_mod.1.weight")
    head: int = size(f"{_BLOCK}.attn.norm_q.weight", 0, f"{_BLOCK}.attn.norm_k.weight")
    depth: int = count("transformer_blocks")
    channels: int = size("img_in.weight", 1, ("proj_out.weight", 0), ("proj_out.bias", 0))
    context: int = size("txt_in.weight", 1, ("txt_norm.weight", 0))


def build(h: QwenImage) -> Keys:
    """Return the keys in the original layout."""
    width = h.width
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    norms = dict.fromkeys(("norm_q", "norm_k", "norm_added_q", "norm_added_k"), scale(h.head))
    block = nest(
        {
            "img_mod.1": modulation(width, width, 6),
            "img_mlp": feed_forward(width),
            "txt_mod.1": modulation(width, width, 6),
            "txt_mlp": feed_forward(width),
            "attn": nest(norms | dict.fromkeys(projections, linear(width, width))),
        }
    )
    keys = nest(
        {
            "time_text_embed.timestep_embedder": two_layers("linear_1", "linear_2", width, FREQUENCIES),
            "txt_norm": scale(h.context),
            "img_in": linear(width, h.channels),
            "txt_in": linear(width, h.context),
            **{f"transformer_blocks.{i}": block for i in range(h.depth)},
            "norm_out.linear": modulation(width, width, 2),
            "proj_out": linear(h.channels, width),
        }
    )
    # an empty tensor by which some programs know a version for editing
    return {**keys, "__index_timestep_zero__": KeyMetadata((0,), optional=True)}


transformer_family.register(
    "qwenimage",
    {"qwen_image": QwenImage(3072, 128, 60, 64, 3584)},
    build=build,
    signs=("transformer_blocks.*.img_mod.1.weight", "transformer_blocks.*.txt_mod.1.weight"),
)
