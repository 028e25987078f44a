"""Flux.1 and what derives from it, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.extensions.layouts import Rule, rename, split, swap


def joint_attention(block: str, there: str) -> list[Rule]:
    """The attention of a block in which text and image have weights of their own.

    Args:
        block: the block in the original layout.
        there: the block in diffusers.
    """
    return [
        split(f"{block}.img_attn.qkv", *(f"{there}.attn.to_{part}" for part in "qkv")),
        split(f"{block}.txt_attn.qkv", *(f"{there}.attn.add_{part}_proj" for part in "qkv")),
        rename(f"{block}.img_attn.norm.query_norm.scale", f"{there}.attn.norm_q.weight"),
        rename(f"{block}.img_attn.norm.key_norm.scale", f"{there}.attn.norm_k.weight"),
        rename(f"{block}.txt_attn.norm.query_norm.scale", f"{there}.attn.norm_added_q.weight"),
        rename(f"{block}.txt_attn.norm.key_norm.scale", f"{there}.attn.norm_added_k.weight"),
        rename(f"{block}.img_attn.proj", f"{there}.attn.to_out.0"),
        rename(f"{block}.txt_attn.proj", f"{there}.attn.to_add_out"),
    ]


def query_key_norm(block: str, there: str) -> list[Rule]:
    """The normalised queries and keys of a block over text and image alike."""
    return [
        rename(f"{block}.norm.query_norm.scale", f"{there}.attn.norm_q.weight"),
        rename(f"{block}.norm.key_norm.scale", f"{there}.attn.norm_k.weight"),
    ]


def embedder(name: str, there: str, first: str = "in_layer", second: str = "out_layer") -> list[Rule]:
    """Two linear layers that bring a number or a vector to the width of the model."""
    return [rename(f"{name}.{first}", f"{there}.linear_1"), rename(f"{name}.{second}", f"{there}.linear_2")]


def blocks(width: int, inner: int) -> list[Rule]:
    """The blocks without their modulation, as Chroma has them.

    Args:
        width: channels of a token.
        inner: channels inside a feed-forward layer.
    """
    double, single = "transformer_blocks.*", "single_transformer_blocks.*"
    projections = [f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v", f"{single}.proj_mlp"]
    return [
        *joint_attention("double_blocks.*", double),
        rename("double_blocks.*.img_mlp.0", f"{double}.ff.net.0.proj"),
        rename("double_blocks.*.img_mlp.2", f"{double}.ff.net.2"),
        rename("double_blocks.*.txt_mlp.0", f"{double}.ff_context.net.0.proj"),
        rename("double_blocks.*.txt_mlp.2", f"{double}.ff_context.net.2"),
        split("single_blocks.*.linear1", *projections, sizes=(width, width, width, inner)),
        rename("single_blocks.*.linear2", f"{single}.proj_out"),
        *query_key_norm("single_blocks.*", single),
    ]


def ends() -> list[Rule]:
    """Where the tokens come from and what becomes of them."""
    return [
        rename("img_in", "x_embedder"),
        rename("txt_in", "context_embedder"),
        rename("final_layer.linear", "proj_out"),
        swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ]


def flux1(width: int, inner: int) -> list[Rule]:
    """Flux.1."""
    return [
        *ends(),
        *embedder("time_in", "time_text_embed.timestep_embedder"),
        *embedder("vector_in", "time_text_embed.text_embedder"),
        *embedder("guidance_in", "time_text_embed.guidance_embedder"),
        *blocks(width, inner),
        rename("double_blocks.*.img_mod.lin", "transformer_blocks.*.norm1.linear"),
        rename("double_blocks.*.txt_mod.lin", "transformer_blocks.*.norm1_context.linear"),
        rename("single_blocks.*.modulation.lin", "single_transformer_blocks.*.norm.linear"),
    ]


def chroma(width: int, inner: int) -> list[Rule]:
    """Chroma: a small network makes all modulation."""
    guidance = "distilled_guidance_layer"
    return [
        *ends(),
        *blocks(width, inner),
        *(rename(name, name) for name in (f"{guidance}.in_proj", f"{guidance}.out_proj")),
        *embedder(f"{guidance}.layers.*", f"{guidance}.layers.*"),
        rename(f"{guidance}.norms.*.scale", f"{guidance}.norms.*.weight"),
    ]


def flux2() -> list[Rule]:
    """Flux.2: one modulation for all blocks of a kind."""
    return [
        *ends(),
        *embedder("time_in", "time_guidance_embed.timestep_embedder"),
        *embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        *(
            rename(f"{kind}.lin", f"{kind}.linear")
            for kind in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        ),
        *joint_attention("double_blocks.*", "transformer_blocks.*"),
        rename("double_blocks.*.img_mlp.0", "transformer_blocks.*.ff.linear_in"),
        rename("double_blocks.*.img_mlp.2", "transformer_blocks.*.ff.linear_out"),
        rename("double_blocks.*.txt_mlp.0", "transformer_blocks.*.ff_context.linear_in"),
        rename("double_blocks.*.txt_mlp.2", "transformer_blocks.*.ff_context.linear_out"),
        rename("single_blocks.*.linear1", "single_transformer_blocks.*.attn.to_qkv_mlp_proj"),
        rename("single_blocks.*.linear2", "single_transformer_blocks.*.attn.to_out"),
        *query_key_norm("single_blocks.*", "single_transformer_blocks.*"),
    ]
