"""Flux.2: blocks as in Flux.1, without biases and with one modulation for all blocks of a kind."""

from __future__ import annotations

from dataclasses import dataclass

from sd_mecha.builtin.conversions import flux as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, linear, nest, unbiased
from sd_mecha.builtin.layers.transformers import (
    FREQUENCIES,
    double_block,
    embedder,
    final_layer,
    modulation,
    single_block,
)
from sd_mecha.extensions.hyperparameters import count, flag, size

_DOUBLE, _SINGLE = "double_blocks.*", "single_blocks.*"


@dataclass(frozen=True)
class Flux2:
    """Sizes of a Flux.2."""

    width: int = size(f"{_SINGLE}.linear1.weight", 1, f"{_DOUBLE}.img_attn.qkv.weight")
    head: int = size(f"{_SINGLE}.norm.query_norm.scale", 0, f"{_DOUBLE}.img_attn.norm.key_norm.scale")
    inner: int = size(f"{_DOUBLE}.img_mlp.2.weight", 1, f"{_DOUBLE}.txt_mlp.2.weight")
    double: int = count("double_blocks")
    single: int = count("single_blocks")
    channels: int = size("img_in.weight", 1, ("final_layer.linear.weight", 0))
    context: int = size("txt_in.weight", 1)
    guided: int = flag("guidance_in.in_layer.weight", "guidance_in.out_layer.weight")


def build(h: Flux2) -> Shapes:
    """Return the keys in the original layout."""
    width = h.width
    double = double_block(width, h.head, h.inner, gates=h.inner)
    single = single_block(width, h.head, h.inner, gates=h.inner)
    keys = nest(
        {
            "img_in": linear(width, h.channels),
            "time_in": embedder(width, FREQUENCIES),
            **({"guidance_in": embedder(width, FREQUENCIES)} if h.guided else {}),
            "txt_in": linear(width, h.context),
            **{f"double_blocks.{i}": double for i in range(h.double)},
            **{f"single_blocks.{i}": single for i in range(h.single)},
            "final_layer": final_layer(width, h.channels),
            "double_stream_modulation_img.lin": modulation(width, width, 6),
            "double_stream_modulation_txt.lin": modulation(width, width, 6),
            "single_stream_modulation.lin": modulation(width, width, 3),
        }
    )
    return unbiased(keys)


transformer_family.register(
    "flux2",
    {
        "flux2_dev": Flux2(6144, 128, 18432, 8, 48, 128, 15360, 1),
        "flux2_klein_4b": Flux2(3072, 128, 9216, 5, 20, 128, 7680, 0),
        "flux2_klein_9b": Flux2(4096, 128, 12288, 8, 24, 128, 12288, 0),
    },
    build=build,
    signs=tuple(
        f"{name}.lin.weight"
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    ),
    rules=lambda h: rules.flux2(),
)
