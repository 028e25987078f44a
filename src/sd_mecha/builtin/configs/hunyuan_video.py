"""HunyuanVideo: Flux.1 for videos, with a transformer of its own that refines the text."""

from __future__ import annotations

from dataclasses import dataclass

from sd_mecha.builtin.conversions import hunyuan_video as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, conv, linear, nest, norm, scale
from sd_mecha.builtin.layers.transformers import (
    FREQUENCIES,
    both_streams,
    embedder,
    final_layer,
    modulation,
    two_layers,
)
from sd_mecha.extensions.hyperparameters import count, flag, size, widens

_MLP_RATIO = 4
_DOUBLE, _SINGLE, _REFINERS = "double_blocks.*", "single_blocks.*", "txt_in.individual_token_refiner.blocks"


@dataclass(frozen=True)
class HunyuanVideo:
    """Sizes of a HunyuanVideo.

    Attributes:
        refiner: number of blocks that refine the text.
        latent: channels of the input.
        patch: side of the square of latent pixels that makes one token.
        outputs: channels of a token as it goes out.
    """

    width: int = size(f"{_DOUBLE}.img_attn_qkv.weight", 1, f"{_DOUBLE}.txt_attn_qkv.weight")
    head: int = size(f"{_DOUBLE}.img_attn_q_norm.weight", 0, f"{_SINGLE}.q_norm.weight")
    double: int = count("double_blocks")
    single: int = count("single_blocks")
    refiner: int = count(_REFINERS)
    latent: int = size("img_in.proj.weight", 1)
    patch: int = size("img_in.proj.weight", 3)
    outputs: int = size("final_layer.linear.weight", 0, "final_layer.linear.bias")
    context: int = size("txt_in.input_embedder.weight", 1, "txt_in.c_embedder.linear_1.weight")
    pooled: int = size("vector_in.in_layer.weight", 1)
    guided: int = flag("guidance_in.mlp.0.weight", "guidance_in.mlp.2.weight", "guidance_in.mlp.0.bias")


def build(h: HunyuanVideo) -> Shapes:
    """Return the keys in the original layout."""
    width = h.width
    feed_forward = two_layers("fc1", "fc2", width, width, _MLP_RATIO * width)
    double = both_streams(
        {
            "mod.linear": modulation(width, width, 6),
            "attn_qkv": linear(3 * width, width),
            "attn_q_norm": scale(h.head),
            "attn_k_norm": scale(h.head),
            "attn_proj": linear(width, width),
            "mlp": feed_forward,
        }
    )
    single = nest(
        {
            "linear1": linear((3 + _MLP_RATIO) * width, width),
            "linear2": linear(width, (1 + _MLP_RATIO) * width),
            "q_norm": scale(h.head),
            "k_norm": scale(h.head),
            "modulation.linear": modulation(width, width, 3),
        }
    )
    refiner = nest(
        {
            "norm1": norm(width),
            "self_attn_qkv": linear(3 * width, width),
            "self_attn_proj": linear(width, width),
            "norm2": norm(width),
            "mlp": feed_forward,
            "adaLN_modulation.1": modulation(width, width, 2),
        }
    )
    number = two_layers("mlp.0", "mlp.2", width, FREQUENCIES)
    return nest(
        {
            "img_in.proj": conv(width, h.latent, 1, h.patch, h.patch),
            "time_in": number,
            "vector_in": embedder(width, h.pooled),
            **({"guidance_in": number} if h.guided else {}),
            "txt_in.input_embedder": linear(width, h.context),
            "txt_in.t_embedder": number,
            "txt_in.c_embedder": two_layers("linear_1", "linear_2", width, h.context),
            **{f"{_REFINERS}.{i}": refiner for i in range(h.refiner)},
            **{f"double_blocks.{i}": double for i in range(h.double)},
            **{f"single_blocks.{i}": single for i in range(h.single)},
            "final_layer": final_layer(width, h.outputs),
        }
    )


transformer_family.register(
    "hunyuanvideo",
    {"hunyuan_video": HunyuanVideo(3072, 128, 20, 40, 2, 16, 2, 64, 4096, 768, 1)},
    build=build,
    signs=(f"{_REFINERS}.*.self_attn_qkv.weight", f"{_REFINERS}.*.self_attn_proj.weight"),
    check=widens(_MLP_RATIO, f"{_DOUBLE}.img_mlp.fc2.weight", f"{_DOUBLE}.txt_mlp.fc2.weight"),
    rules=lambda h: rules.to_diffusers(h.width, _MLP_RATIO * h.width),
    to_comfyui=lambda h: rules.to_comfyui(),
)
