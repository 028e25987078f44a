"""What a layer does, told by the names in its key: attention, MLP, norm or embedding.

Names are those of the UNets, diffusion transformers and language models of the field. Convolutions, projections
between blocks, modulation, and tensors that attention and MLP share have no type here.
"""

from __future__ import annotations

import re

LAYER_TYPES = (
    "attention",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.qkv",
    "attention.out",
    "mlp",
    "norm",
    "embedding",
)
"""What a key can be asked for; `attention` stands for all of its parts. A fused `attention.qkv` is no `attention.q`."""

_PARAMETERS = frozenset({"weight", "bias", "scale", "gamma", "beta"})
_NORM = re.compile(r"(^|_)(norm|norms|ln|layernorm|layer_norm|rmsnorm|groupnorm)(\d+|_\w+)?$|norm\d?$")
_ATTENTION = re.compile(r"(attn|attention|selfattention|crossattention)(\d|_|$)|(self|cross)_?(attn|attention)$")
_PARTS = {
    "attention.qkv": re.compile(r"(to_|w)?(added_)?(qkv|kv)(_proj|_linear)?|in_proj(_weight|_bias)?|c_attn"),
    "attention.q": re.compile(r"(to_q|q_proj|q_linear|add_q_proj|to_added_q)(_\w+)?|q|query|w\d?q|q_img"),
    "attention.k": re.compile(r"(to_k|k_proj|k_linear|add_k_proj|to_added_k)(_\w+)?|k|key|w\d?k|k_img"),
    "attention.v": re.compile(r"(to_v|v_proj|v_linear|add_v_proj|to_added_v)(_\w+)?|v|value|w\d?v|v_img"),
    "attention.out": re.compile(r"(to_out|to_add_out)(_\w+)?|(o|out|output)_proj|o|out|w\d?o|proj|proj_out|c_proj"),
}
_CERTAIN = re.compile(r"to_\w+|added?_[qkv]_proj|[qkvo]_proj|in_proj_(weight|bias)|to_added_\w+")
_MLP = re.compile(r"(^|_)(mlp|ff|ffn|feed_?forward|densereludense)([_\dcx]|$)|^(gate|up|down)_proj$|^fc\d$")
_EMBEDDING = re.compile(
    r"embed(?!ders$)|^(shared|wte|wpe|label_emb|pos_emb|time_emb|class_emb)$|^(img|txt|time|vector|guidance|y)_in$"
)


def layer_type(key: str) -> str | None:
    """Return the layer type of a key, one of `LAYER_TYPES`, None where its names tell none.

    >>> layer_type("double_blocks.3.img_attn.qkv.weight"), layer_type("layers.0.mlp.gate_proj.weight")
    ('attention.qkv', 'mlp')
    >>> layer_type("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    'attention.k'
    >>> layer_type("double_blocks.3.img_attn.norm.key_norm.scale"), layer_type("conv_in.weight")
    ('norm', None)
    """
    parts = key.split(".")
    lowered = [part.lower() for part in parts]
    modules = lowered[:-1] if lowered[-1] in _PARAMETERS and len(parts) > 1 else lowered
    last = modules[-1]
    if last.isdecimal() and len(modules) > 1:  # a step of a sequence, such as `to_out.0`
        if modules[-2] in ("in_layers", "out_layers") and last == "0":
            return "norm"
        last = modules[-2]
    if _NORM.search(last) or lowered[-1] == "gamma":
        return "norm"
    if any("modulation" in module for module in modules) or last == "to_qkv_mlp_proj":
        return None
    return _attention(modules, last) or _other(modules)


def _attention(modules: list[str], last: str) -> str | None:
    places = [i for i, module in enumerate(modules) if module != "attentions" and _ATTENTION.search(module)]
    if not places and not _CERTAIN.fullmatch(last):
        return None
    mlp = [i for i, module in enumerate(modules) if _MLP.search(module)]
    if places and mlp and mlp[-1] > places[-1]:
        return None
    name = re.sub(r"^.*attn_(?=(qkv|proj)$)", "", last)  # `img_attn_qkv`
    return next((part for part, names in _PARTS.items() if names.fullmatch(name)), "attention" if places else None)


def _other(modules: list[str]) -> str | None:
    embedding = next((i for i, module in enumerate(modules) if _EMBEDDING.search(module)), None)
    mlp = next((i for i, module in enumerate(modules) if _MLP.search(module)), None)
    if embedding is not None and mlp is not None and mlp > embedding:
        # the MLP of an embedder belongs to it, that of a numbered layer below one does not
        return "mlp" if any(module.isdecimal() for module in modules[embedding:mlp]) else "embedding"
    if mlp is not None:
        return "mlp"
    return None if embedding is None else "embedding"
