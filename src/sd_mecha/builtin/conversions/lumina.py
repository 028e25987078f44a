"""Lumina-Image 2 and Z-Image, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.builtin.conversions.flux import embedder
from sd_mecha.extensions.layouts import Rule, keep, rename, split

BLOCKS = ("noise_refiner.*", "context_refiner.*", "layers.*")


def lumina(width: int, shared: int) -> list[Rule]:
    """Lumina-Image 2; diffusers leaves out a norm that nothing uses.

    Args:
        width: channels of a token.
        shared: channels of the keys and values.
    """
    rules = [
        *keep("x_embedder"),
        *embedder("t_embedder.mlp", "time_caption_embed.timestep_embedder", "0", "2"),
        rename("cap_embedder", "time_caption_embed.caption_embedder"),
        *embedder("final_layer", "norm_out", "adaLN_modulation.1", "linear"),
    ]
    for block in BLOCKS:
        rules += _attention(block, "attn", (width, shared, shared))
        rules += [rename(f"{block}.feed_forward.w{i}", f"{block}.feed_forward.linear_{i}") for i in (1, 2, 3)]
        modulated = block != "context_refiner.*"
        rules += [
            rename(f"{block}.attention_norm1", f"{block}.norm1.norm" if modulated else f"{block}.norm1"),
            rename(f"{block}.attention_norm2", f"{block}.norm2"),
            rename(f"{block}.adaLN_modulation.1", f"{block}.norm1.linear"),
            *keep(f"{block}.ffn_norm1", f"{block}.ffn_norm2"),
        ]
    return rules


def z_image() -> list[Rule]:
    """Z-Image, whose diffusers layout names the layers at either end by the sizes of patches."""
    blocks = [name.removesuffix(".*") for name in BLOCKS]
    rules = [
        *keep("x_pad_token", "cap_pad_token", "t_embedder", "cap_embedder", *blocks),
        rename("x_embedder", "all_x_embedder.2-1"),
        rename("final_layer", "all_final_layer.2-1"),
    ]
    for block in BLOCKS:
        rules += _attention(block, "attention")
    return rules


def _attention(block: str, name: str, sizes: tuple[int, ...] | None = None) -> list[Rule]:
    here, there = f"{block}.attention", f"{block}.{name}"
    return [
        split(f"{here}.qkv", *(f"{there}.to_{part}" for part in "qkv"), sizes=sizes),
        rename(f"{here}.out", f"{there}.to_out.0"),
        *(rename(f"{here}.{part}_norm", f"{there}.norm_{part}") for part in "qk"),
    ]
