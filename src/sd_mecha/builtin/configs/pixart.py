"""PixArt Sigma: attention within the image and then to the text, with one modulation for all blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import pixart as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import conv, linear, nest
from sd_mecha.builtin.layers.transformers import FREQUENCIES, two_layers
from sd_mecha.extensions.config_families import Keys
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.hyperparameters import count, read_by, size
from sd_mecha.extensions.model_configs import KeyMetadata

PATCH = 2
TOKENS, POSITIONS = 300, 4096
"""The length of the text and the table of positions of the version that people know.

Diffusers keeps neither, and files may lack the latter.
"""


def _known(pattern: str, axis: int, default: int) -> Callable[[Header], int]:
    return lambda header: header.size(pattern, axis) if header.sized(pattern) else default


@dataclass(frozen=True)
class PixArt:
    """Sizes of a PixArt.

    Attributes:
        channels: of the latent image; the output has a variance for each too.
        tokens: length of the text.
        positions: tokens of the image that the table of position embeddings is for.
    """

    width: int = size("blocks.*.attn.qkv.weight", 1, "blocks.*.cross_attn.kv_linear.weight")
    depth: int = count("blocks")
    channels: int = size("x_embedder.proj.weight", 1)
    context: int = size("y_embedder.y_proj.fc1.weight", 1, "y_embedder.y_embedding")
    tokens: int = read_by(_known("y_embedder.y_embedding", 0, TOKENS))
    positions: int = read_by(_known("pos_embed", 1, POSITIONS))


def build(h: PixArt) -> Keys:
    """Return the keys in the original layout."""
    width = h.width
    block = nest(
        {
            "scale_shift_table": (6, width),
            "attn.qkv": linear(3 * width, width),
            "attn.proj": linear(width, width),
            "cross_attn.q_linear": linear(width, width),
            "cross_attn.kv_linear": linear(2 * width, width),
            "cross_attn.proj": linear(width, width),
            "mlp": two_layers("fc1", "fc2", width, width, 4 * width),
        }
    )
    keys = nest(
        {
            "y_embedder.y_embedding": (h.tokens, h.context),
            "final_layer.scale_shift_table": (2, width),
            "t_block.1": linear(6 * width, width),
            "x_embedder.proj": conv(width, h.channels, PATCH, PATCH),
            "t_embedder.mlp": two_layers("0", "2", width, FREQUENCIES),
            "y_embedder.y_proj": two_layers("fc1", "fc2", width, h.context),
            **{f"blocks.{i}": block for i in range(h.depth)},
            "final_layer.linear": linear(2 * PATCH * PATCH * h.channels, width),
        }
    )
    # the table follows from its size
    return {"pos_embed": KeyMetadata((1, h.positions, width), torch.float32, optional=True), **keys}


transformer_family.register(
    "pixart",
    {"pixart_sigma_xl_2_1024_ms": PixArt(1152, 28, 4, 4096, TOKENS, POSITIONS)},
    build=build,
    signs=("t_block.1.weight", "blocks.*.cross_attn.kv_linear.weight"),
    rules=lambda h: rules.pixart(),
    dtype=torch.float32,
)
