"""What the transformers library calls the layers of a CLIP text encoder of OpenCLIP."""

from __future__ import annotations

import re

_NAMES = {
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_LAYER_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
_FUSED = "attn.in_proj_"


def transformers_names(key: str) -> tuple[str, ...]:
    """Return the keys that hold what a key of OpenCLIP holds; none for the scale of the logits.

    The weights and biases of queries, keys and values are one tensor in OpenCLIP, rows below each other, and the
    projection is the transpose of that of transformers.

    >>> transformers_names("transformer.resblocks.3.attn.in_proj_bias")[1:]
    ('text_model.encoder.layers.3.self_attn.k_proj.bias', 'text_model.encoder.layers.3.self_attn.v_proj.bias')
    >>> transformers_names("text_projection"), transformers_names("logit_scale")
    (('text_projection.weight',), ())
    """
    if not (layer := _LAYER.match(key)):
        return tuple(new + key.removeprefix(old) for old, new in _NAMES.items() if key.startswith(old))
    prefix, rest = f"text_model.encoder.layers.{layer[1]}.", layer[2]
    if rest.startswith(_FUSED):
        return tuple(f"{prefix}self_attn.{name}_proj.{rest.removeprefix(_FUSED)}" for name in "qkv")
    return tuple(prefix + new + rest.removeprefix(old) for old, new in _LAYER_NAMES.items() if rest.startswith(old))
