"""AuraFlow, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.builtin.conversions.flux import embedder
from sd_mecha.extensions.layouts import Rule, keep, rename, swap


def auraflow() -> list[Rule]:
    """All blocks of either kind are named alike."""
    double, single = "joint_transformer_blocks.*", "single_transformer_blocks.*"
    return [
        *keep("register_tokens"),
        *embedder("t_embedder.mlp", "time_step_proj", "0", "2"),
        rename("cond_seq_linear", "context_embedder"),
        rename("positional_encoding", "pos_embed.pos_embed"),
        rename("init_x_linear", "pos_embed.proj"),
        rename("final_linear", "proj_out"),
        swap("modF.1", "norm_out.linear"),
        *_feed_forward("double_layers.*.mlpX", f"{double}.ff"),
        *_feed_forward("double_layers.*.mlpC", f"{double}.ff_context"),
        rename("double_layers.*.modX.1", f"{double}.norm1.linear"),
        rename("double_layers.*.modC.1", f"{double}.norm1_context.linear"),
        *(rename(f"double_layers.*.attn.w2{part}", f"{double}.attn.to_{part}") for part in "qkv"),
        *(rename(f"double_layers.*.attn.w1{part}", f"{double}.attn.add_{part}_proj") for part in "qkv"),
        rename("double_layers.*.attn.w2o", f"{double}.attn.to_out.0"),
        rename("double_layers.*.attn.w1o", f"{double}.attn.to_add_out"),
        *_feed_forward("single_layers.*.mlp", f"{single}.ff"),
        rename("single_layers.*.modCX.1", f"{single}.norm1.linear"),
        *(rename(f"single_layers.*.attn.w1{part}", f"{single}.attn.to_{part}") for part in "qkv"),
        rename("single_layers.*.attn.w1o", f"{single}.attn.to_out.0"),
    ]


def _feed_forward(layer: str, there: str) -> list[Rule]:
    names = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
    return [rename(f"{layer}.{old}", f"{there}.{new}") for old, new in names.items()]
