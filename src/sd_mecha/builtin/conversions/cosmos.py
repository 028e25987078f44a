"""Cosmos Predict2, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.builtin.conversions.flux import embedder
from sd_mecha.extensions.layouts import Rule, rename


def cosmos() -> list[Rule]:
    """The whole network; the buffers of the position embedding have no place in diffusers."""
    block, there = "blocks.*", "transformer_blocks.*"
    return [
        rename("t_embedder.1", "time_embed.t_embedder"),
        rename("t_embedding_norm", "time_embed.norm"),
        rename("x_embedder.proj.1", "patch_embed.proj"),
        *_attention(f"{block}.self_attn", f"{there}.attn1"),
        *_attention(f"{block}.cross_attn", f"{there}.attn2"),
        rename(f"{block}.mlp.layer1", f"{there}.ff.net.0.proj"),
        rename(f"{block}.mlp.layer2", f"{there}.ff.net.2"),
        *embedder(f"{block}.adaln_modulation_self_attn", f"{there}.norm1", "1", "2"),
        *embedder(f"{block}.adaln_modulation_cross_attn", f"{there}.norm2", "1", "2"),
        *embedder(f"{block}.adaln_modulation_mlp", f"{there}.norm3", "1", "2"),
        rename("final_layer.linear", "proj_out"),
        *embedder("final_layer.adaln_modulation", "norm_out", "1", "2"),
    ]


def _attention(name: str, there: str) -> list[Rule]:
    return [
        *(rename(f"{name}.{part}_proj", f"{there}.to_{part}") for part in "qkv"),
        *(rename(f"{name}.{part}_norm", f"{there}.norm_{part}") for part in "qk"),
        rename(f"{name}.output_proj", f"{there}.to_out.0"),
    ]
