"""PixArt, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.builtin.conversions.flux import embedder
from sd_mecha.extensions.layouts import Rule, rename, split


def pixart() -> list[Rule]:
    """The whole network; diffusers makes the positions itself and has no embedding of an absent text."""
    block, there = "blocks.*", "transformer_blocks.*"
    return [
        rename("x_embedder.proj", "pos_embed.proj"),
        *embedder("t_embedder.mlp", "adaln_single.emb.timestep_embedder", "0", "2"),
        rename("t_block.1", "adaln_single.linear"),
        *embedder("y_embedder.y_proj", "caption_projection", "fc1", "fc2"),
        rename(f"{block}.scale_shift_table", f"{there}.scale_shift_table"),
        split(f"{block}.attn.qkv", *(f"{there}.attn1.to_{part}" for part in "qkv")),
        rename(f"{block}.attn.proj", f"{there}.attn1.to_out.0"),
        rename(f"{block}.cross_attn.q_linear", f"{there}.attn2.to_q"),
        split(f"{block}.cross_attn.kv_linear", f"{there}.attn2.to_k", f"{there}.attn2.to_v"),
        rename(f"{block}.cross_attn.proj", f"{there}.attn2.to_out.0"),
        rename(f"{block}.mlp.fc1", f"{there}.ff.net.0.proj"),
        rename(f"{block}.mlp.fc2", f"{there}.ff.net.2"),
        rename("final_layer.scale_shift_table", "scale_shift_table"),
        rename("final_layer.linear", "proj_out"),
    ]
