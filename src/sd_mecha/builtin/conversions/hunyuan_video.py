"""HunyuanVideo, from the original layout to those of ComfyUI and of diffusers."""

from __future__ import annotations

from sd_mecha.builtin.conversions import flux
from sd_mecha.extensions.layouts import Rule, keep, rename, split, swap

_REFINER = "txt_in.individual_token_refiner.blocks.*"


def to_comfyui() -> list[Rule]:
    """The layers of Flux.1 have the names of Flux.1."""
    return [
        *keep("img_in", "txt_in", "vector_in", "double_blocks", "single_blocks", "final_layer"),
        *_embedder("time_in", "mlp.0", "mlp.2"),
        *_embedder("guidance_in", "mlp.0", "mlp.2"),
        *_embedder("txt_in.t_embedder", "mlp.0", "mlp.2"),
        *_embedder("txt_in.c_embedder", "linear_1", "linear_2"),
        rename(f"{_REFINER}.self_attn_qkv", f"{_REFINER}.self_attn.qkv"),
        rename(f"{_REFINER}.self_attn_proj", f"{_REFINER}.self_attn.proj"),
        *_feed_forward(f"{_REFINER}.mlp"),
        *(rule for side in ("img", "txt") for rule in _stream(f"double_blocks.*.{side}")),
        rename("single_blocks.*.q_norm.weight", "single_blocks.*.norm.query_norm.scale"),
        rename("single_blocks.*.k_norm.weight", "single_blocks.*.norm.key_norm.scale"),
        rename("single_blocks.*.modulation.linear", "single_blocks.*.modulation.lin"),
    ]


def to_diffusers(width: int, inner: int) -> list[Rule]:
    """Most layers have the names of Flux.1 there.

    Args:
        width: channels of a token.
        inner: channels inside a feed-forward layer.
    """
    double, single = "transformer_blocks.*", "single_transformer_blocks.*"
    there = "context_embedder.token_refiner.refiner_blocks.*"
    projections = [f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v", f"{single}.proj_mlp"]
    return [
        rename("img_in", "x_embedder"),
        *flux.embedder("time_in.mlp", "time_text_embed.timestep_embedder", "0", "2"),
        *flux.embedder("vector_in", "time_text_embed.text_embedder"),
        *flux.embedder("guidance_in.mlp", "time_text_embed.guidance_embedder", "0", "2"),
        rename("txt_in.input_embedder", "context_embedder.proj_in"),
        *flux.embedder("txt_in.t_embedder.mlp", "context_embedder.time_text_embed.timestep_embedder", "0", "2"),
        *flux.embedder("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", "linear_1", "linear_2"),
        rename(f"{_REFINER}.adaLN_modulation.1", f"{there}.norm_out.linear"),
        *(rename(f"{_REFINER}.{norm}", f"{there}.{norm}") for norm in ("norm1", "norm2")),
        split(f"{_REFINER}.self_attn_qkv", *(f"{there}.attn.to_{part}" for part in "qkv")),
        rename(f"{_REFINER}.self_attn_proj", f"{there}.attn.to_out.0"),
        *_diffusers_feed_forward(f"{_REFINER}.mlp", f"{there}.ff"),
        *_diffusers_stream("double_blocks.*.img", double, "to_{}", "to_out.0", "", ""),
        *_diffusers_stream("double_blocks.*.txt", double, "add_{}_proj", "to_add_out", "added_", "_context"),
        split("single_blocks.*.linear1", *projections, sizes=(width, width, width, inner)),
        rename("single_blocks.*.linear2", f"{single}.proj_out"),
        rename("single_blocks.*.q_norm", f"{single}.attn.norm_q"),
        rename("single_blocks.*.k_norm", f"{single}.attn.norm_k"),
        rename("single_blocks.*.modulation.linear", f"{single}.norm.linear"),
        rename("final_layer.linear", "proj_out"),
        swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ]


def _embedder(name: str, first: str, second: str) -> list[Rule]:
    return [rename(f"{name}.{first}", f"{name}.in_layer"), rename(f"{name}.{second}", f"{name}.out_layer")]


def _feed_forward(layer: str) -> list[Rule]:
    return [rename(f"{layer}.fc1", f"{layer}.0"), rename(f"{layer}.fc2", f"{layer}.2")]


def _stream(half: str) -> list[Rule]:
    return [
        rename(f"{half}_mod.linear", f"{half}_mod.lin"),
        rename(f"{half}_attn_qkv", f"{half}_attn.qkv"),
        rename(f"{half}_attn_q_norm.weight", f"{half}_attn.norm.query_norm.scale"),
        rename(f"{half}_attn_k_norm.weight", f"{half}_attn.norm.key_norm.scale"),
        rename(f"{half}_attn_proj", f"{half}_attn.proj"),
        *_feed_forward(f"{half}_mlp"),
    ]


def _diffusers_feed_forward(layer: str, there: str) -> list[Rule]:
    return [rename(f"{layer}.fc1", f"{there}.net.0.proj"), rename(f"{layer}.fc2", f"{there}.net.2")]


def _diffusers_stream(half: str, there: str, projection: str, out: str, norm: str, ending: str) -> list[Rule]:
    return [
        rename(f"{half}_mod.linear", f"{there}.norm1{ending}.linear"),
        split(f"{half}_attn_qkv", *(f"{there}.attn.{projection.format(part)}" for part in "qkv")),
        rename(f"{half}_attn_q_norm", f"{there}.attn.norm_{norm}q"),
        rename(f"{half}_attn_k_norm", f"{there}.attn.norm_{norm}k"),
        rename(f"{half}_attn_proj", f"{there}.attn.{out}"),
        *_diffusers_feed_forward(f"{half}_mlp", f"{there}.ff{ending}"),
    ]
