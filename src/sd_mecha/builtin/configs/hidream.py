"""HiDream: blocks of two streams and then one, whose feed-forward layers choose among experts.

Diffusers names the tensors as the original does, so there is no layout of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, linear, nest, scale
from sd_mecha.builtin.layers.transformers import FREQUENCIES, final_layer, gated_feed_forward, modulation, two_layers
from sd_mecha.extensions.hyperparameters import count, size

_SINGLE, _DOUBLE = "single_stream_blocks.*.block.ff_i", "double_stream_blocks.*.block.ff_i"


@dataclass(frozen=True)
class HiDream:
    """Sizes of a HiDream.

    Attributes:
        inner: channels inside an expert, and inside the feed-forward layer of the text.
        shared: channels inside the expert that every token uses.
        experts: number of experts to choose from.
        context: channels of the text, which every block projects for itself.
    """

    width: int = size(f"{_SINGLE}.gate.weight", 1, f"{_DOUBLE}.gate.weight")
    inner: int = size(f"{_SINGLE}.experts.*.w1.weight", 0, f"{_DOUBLE}.experts.*.w1.weight")
    shared: int = size(f"{_SINGLE}.shared_experts.w1.weight", 0, f"{_DOUBLE}.shared_experts.w1.weight")
    experts: int = size(f"{_SINGLE}.gate.weight", 0, f"{_DOUBLE}.gate.weight")
    double: int = count("double_stream_blocks")
    single: int = count("single_stream_blocks")
    channels: int = size("x_embedder.proj.weight", 1, ("final_layer.linear.weight", 0), ("final_layer.linear.bias", 0))
    context: int = size("caption_projection.*.linear.weight", 1)
    pooled: int = size("p_embedder.pooled_embedder.linear_1.weight", 1)


def build(h: HiDream) -> Shapes:
    """Return the keys in the original layout."""
    width = h.width
    experts = nest(
        {
            "shared_experts": gated_feed_forward(width, h.shared),
            **{f"experts.{i}": gated_feed_forward(width, h.inner) for i in range(h.experts)},
            "gate": {"weight": (h.experts, width)},
        }
    )
    double = nest(
        {
            "adaLN_modulation.1": modulation(width, width, 12),
            "attn1": _attention(width, "") | _attention(width, "_t"),
            "ff_i": experts,
            "ff_t": gated_feed_forward(width, h.inner),
        }
    )
    single = nest({"adaLN_modulation.1": modulation(width, width, 6), "attn1": _attention(width, ""), "ff_i": experts})
    texts = h.double + h.single + 1  # one for each block, and that of the other text encoder
    return nest(
        {
            "t_embedder.timestep_embedder": two_layers("linear_1", "linear_2", width, FREQUENCIES),
            "p_embedder.pooled_embedder": two_layers("linear_1", "linear_2", width, h.pooled),
            "x_embedder.proj": linear(width, h.channels),
            **{f"double_stream_blocks.{i}.block": double for i in range(h.double)},
            **{f"single_stream_blocks.{i}.block": single for i in range(h.single)},
            "final_layer": final_layer(width, h.channels),
            **{f"caption_projection.{i}.linear": linear(width, h.context, bias=False) for i in range(texts)},
        }
    )


def _attention(width: int, stream: str) -> Shapes:
    projections = {f"{name}{stream}": linear(width, width) for name in ("to_q", "to_k", "to_v", "to_out")}
    return nest(projections | {f"{name}{stream}": scale(width) for name in ("q_rms_norm", "k_rms_norm")})


transformer_family.register(
    "hidream",
    {"hidream_i1": HiDream(2560, 6912, 3584, 4, 16, 32, 64, 4096, 2048)},
    build=build,
    signs=(f"{_SINGLE}.gate.weight", f"{_DOUBLE}.gate.weight"),
)
