"""Wan, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.builtin.conversions.flux import embedder
from sd_mecha.extensions.layouts import Rule, keep, rename


def wan() -> list[Rule]:
    """The whole network, with or without attention to an image."""
    condition, image = "condition_embedder", "condition_embedder.image_embedder"
    return [
        *keep("patch_embedding"),
        *embedder("text_embedding", f"{condition}.text_embedder", "0", "2"),
        *embedder("time_embedding", f"{condition}.time_embedder", "0", "2"),
        rename("time_projection.1", f"{condition}.time_proj"),
        rename("img_emb.proj.0", f"{image}.norm1"),
        rename("img_emb.proj.1", f"{image}.ff.net.0.proj"),
        rename("img_emb.proj.3", f"{image}.ff.net.2"),
        rename("img_emb.proj.4", f"{image}.norm2"),
        rename("blocks.*.modulation", "blocks.*.scale_shift_table"),
        *_attention("self_attn", "attn1"),
        rename("blocks.*.norm3", "blocks.*.norm2"),
        *_attention("cross_attn", "attn2"),
        rename("blocks.*.cross_attn.k_img", "blocks.*.attn2.add_k_proj"),
        rename("blocks.*.cross_attn.v_img", "blocks.*.attn2.add_v_proj"),
        rename("blocks.*.cross_attn.norm_k_img", "blocks.*.attn2.norm_added_k"),
        rename("blocks.*.ffn.0", "blocks.*.ffn.net.0.proj"),
        rename("blocks.*.ffn.2", "blocks.*.ffn.net.2"),
        rename("head.modulation", "scale_shift_table"),
        rename("head.head", "proj_out"),
    ]


def _attention(name: str, there: str) -> list[Rule]:
    block, other = f"blocks.*.{name}", f"blocks.*.{there}"
    return [
        *(rename(f"{block}.{part}", f"{other}.to_{part}") for part in "qkv"),
        rename(f"{block}.o", f"{other}.to_out.0"),
        *(rename(f"{block}.{norm}", f"{other}.{norm}") for norm in ("norm_q", "norm_k")),
    ]
