"""Text encoders of CLIP, from the names of OpenCLIP to those of the transformers library."""

from __future__ import annotations

from sd_mecha.extensions.layouts import Rule, rename, split, transpose


def open_clip() -> list[Rule]:
    """The text encoder with its projection; the scale of the logits has no place in transformers."""
    layer, there = "transformer.resblocks.*", "text_model.encoder.layers.*"
    heads = [f"{there}.self_attn.{part}_proj" for part in "qkv"]
    return [
        rename("token_embedding", "text_model.embeddings.token_embedding"),
        rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        rename(f"{layer}.ln_1", f"{there}.layer_norm1"),
        rename(f"{layer}.ln_2", f"{there}.layer_norm2"),
        *(split(f"{layer}.attn.in_proj_{kind}", *(f"{head}.{kind}" for head in heads)) for kind in ("weight", "bias")),
        rename(f"{layer}.attn.out_proj", f"{there}.self_attn.out_proj"),
        rename(f"{layer}.mlp.c_fc", f"{there}.mlp.fc1"),
        rename(f"{layer}.mlp.c_proj", f"{there}.mlp.fc2"),
        rename("ln_final", "text_model.final_layer_norm"),
        transpose("text_projection", "text_projection.weight"),
    ]
