"""Stable Diffusion 3, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.builtin.conversions.flux import embedder
from sd_mecha.extensions.layouts import Rule, rename, split, swap


def mmdit(depth: int) -> list[Rule]:
    """The transformer.

    Args:
        depth: number of blocks; the last one ends the text with a layer whose halves change places.
    """
    block = "transformer_blocks.*"
    return [
        rename("pos_embed", "pos_embed.pos_embed"),
        rename("x_embedder.proj", "pos_embed.proj"),
        *embedder("t_embedder.mlp", "time_text_embed.timestep_embedder", "0", "2"),
        *embedder("y_embedder.mlp", "time_text_embed.text_embedder", "0", "2"),
        rename("context_embedder", "context_embedder"),
        *_stream("joint_blocks.*.x_block", block, ""),
        *_attention("joint_blocks.*.x_block.attn2", f"{block}.attn2", "to_{}", "to_out.0", ""),
        *_stream("joint_blocks.*.context_block", block, "_context"),
        swap(
            f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1",
            f"transformer_blocks.{depth - 1}.norm1_context.linear",
        ),
        rename("final_layer.linear", "proj_out"),
        swap("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ]


def _stream(half: str, there: str, ending: str) -> list[Rule]:
    image = not ending
    names = ("to_{}", "to_out.0", "") if image else ("add_{}_proj", "to_add_out", "added_")
    return [
        *_attention(f"{half}.attn", f"{there}.attn", *names),
        rename(f"{half}.mlp.fc1", f"{there}.ff{ending}.net.0.proj"),
        rename(f"{half}.mlp.fc2", f"{there}.ff{ending}.net.2"),
        rename(f"{half}.adaLN_modulation.1", f"{there}.norm1{ending}.linear"),
    ]


def _attention(layer: str, there: str, projection: str, out: str, norm: str) -> list[Rule]:
    return [
        split(f"{layer}.qkv", *(f"{there}.{projection.format(part)}" for part in "qkv")),
        rename(f"{layer}.proj", f"{there}.{out}"),
        rename(f"{layer}.ln_q", f"{there}.norm_{norm}q"),
        rename(f"{layer}.ln_k", f"{there}.norm_{norm}k"),
    ]
