"""LTX-Video: attention within the video and then to the text, with one modulation for all blocks."""

from __future__ import annotations

from dataclasses import dataclass

from sd_mecha.builtin.conversions import ltxv as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, linear, nest, scale
from sd_mecha.builtin.layers.transformers import FREQUENCIES, feed_forward, two_layers
from sd_mecha.extensions.hyperparameters import count, size

_BLOCK = "transformer_blocks.*"


@dataclass(frozen=True)
class Ltxv:
    """Sizes of an LTX-Video; one latent pixel is a token."""

    width: int = size(f"{_BLOCK}.attn1.q_norm.weight", 0, f"{_BLOCK}.attn2.q_norm.weight")
    depth: int = count("transformer_blocks")
    channels: int = size("patchify_proj.weight", 1, ("proj_out.weight", 0), ("proj_out.bias", 0))
    context: int = size("caption_projection.linear_1.weight", 1)


def build(h: Ltxv) -> Shapes:
    """Return the keys in the original layout."""
    width, square = h.width, linear(h.width, h.width)
    norms = dict.fromkeys(("q_norm", "k_norm"), scale(width))
    attention = nest(norms | dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), square))
    table = (6, width)
    block = nest({"scale_shift_table": table, "attn1": attention, "ff": feed_forward(width), "attn2": attention})
    return nest(
        {
            "scale_shift_table": (2, width),
            "patchify_proj": linear(width, h.channels),
            "adaln_single.emb.timestep_embedder": two_layers("linear_1", "linear_2", width, FREQUENCIES),
            "adaln_single.linear": linear(6 * width, width),
            "caption_projection": two_layers("linear_1", "linear_2", width, h.context),
            **{f"transformer_blocks.{i}": block for i in range(h.depth)},
            "proj_out": linear(h.channels, width),
        }
    )


transformer_family.register(
    "ltxv",
    {"ltxv_2b_v0.9": Ltxv(2048, 28, 128, 4096), "ltxv_13b_v0.9.7": Ltxv(4096, 48, 128, 4096)},
    build=build,
    signs=(f"{_BLOCK}.attn1.q_norm.weight", f"{_BLOCK}.attn2.q_norm.weight"),
    # networks of other families have attention that diffusers names alike, but no such tables
    check=lambda header: header.has(f"{_BLOCK}.scale_shift_table"),
    rules=lambda h: rules.ltxv(),
)
