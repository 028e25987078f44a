"""LTX-Video, from the original layout to that of diffusers."""

from __future__ import annotations

from sd_mecha.extensions.layouts import Rule, keep, rename


def ltxv() -> list[Rule]:
    """The whole network; most names are the same."""
    return [
        *keep("scale_shift_table", "caption_projection", "transformer_blocks", "proj_out"),
        rename("patchify_proj", "proj_in"),
        rename("adaln_single", "time_embed"),
        *(
            rename(f"transformer_blocks.*.{attn}.{part}_norm", f"transformer_blocks.*.{attn}.norm_{part}")
            for attn in ("attn1", "attn2")
            for part in "qk"
        ),
    ]
