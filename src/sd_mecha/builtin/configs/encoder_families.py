"""Text encoders as files of their own, as the transformers library names them: CLIP, T5 and UMT5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sd_mecha.builtin.layers.text_encoders import CLIP_TOKENS, clip_text, t5_encoder
from sd_mecha.extensions.config_families import Family, Keys, Layout
from sd_mecha.extensions.hyperparameters import count, read_by, reader, size, widens
from sd_mecha.extensions.model_configs import KeyMetadata, register_family

_CLIP_NAMES = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
_LAYER = "text_model.encoder.layers.*"


@dataclass(frozen=True)
class Clip:
    """Sizes of a text encoder of CLIP.

    Attributes:
        width: channels between the layers.
        layers: number of layers.
        tokens: length of a text.
    """

    width: int = size(f"{_LAYER}.self_attn.q_proj.weight", 1, f"{_LAYER}.self_attn.k_proj.weight")
    layers: int = count("text_model.encoder.layers")
    tokens: int = size("text_model.embeddings.position_embedding.weight", 0)


def build_clip(h: Clip) -> Mapping[str, Keys]:
    """Return the keys; files may lack the projection, which not all models use."""
    keys = {f"text_model.{key}": shape for key, shape in clip_text(h.width, h.layers, h.tokens).items()}
    optional = {
        "text_model.embeddings.position_ids": KeyMetadata((1, h.tokens), torch.int64, optional=True),
        "text_projection.weight": KeyMetadata((h.width, h.width), torch.float16, optional=True),
        "logit_scale": KeyMetadata((), torch.float16, optional=True),
    }
    return {_CLIP_NAMES.get(h.width, "clip"): {**keys, **optional}}


_ATTENTION, _FEED = (f"encoder.block.*.layer.*.{name}" for name in ("SelfAttention", "DenseReluDense"))
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


@dataclass(frozen=True)
class T5:
    """Sizes of an encoder of T5 or UMT5.

    Attributes:
        width: channels between the layers.
        layers: number of layers.
        heads: attention heads per layer.
        inner: channels of all heads.
        feed: channels inside a feed-forward layer.
        vocabulary: number of tokens.
        biased: whether every layer has biases of its own for distances, as in UMT5.
    """

    width: int = size(f"{_ATTENTION}.q.weight", 1, f"{_ATTENTION}.k.weight")
    layers: int = count("encoder.block")
    heads: int = size(f"encoder.block.*.{_BIAS}", 1)
    inner: int = size(f"{_ATTENTION}.q.weight", 0, f"{_ATTENTION}.k.weight")
    feed: int = size(f"{_FEED}.wi_0.weight", 0, f"{_FEED}.wi_1.weight")
    vocabulary: int = size("shared.weight", 0, "encoder.embed_tokens.weight")
    biased: int = read_by(lambda header: int(header.reach(f"encoder.block.*.{_BIAS}") > 1))


def build_t5(h: T5) -> Mapping[str, Keys]:
    """Return the keys; some files hold the embeddings a second time."""
    shapes = t5_encoder(h.width, h.layers, h.heads, h.inner // h.heads, h.feed, h.vocabulary)
    bias = shapes[f"encoder.block.0.{_BIAS}"]
    biases = {f"encoder.block.{i}.{_BIAS}": bias for i in range(h.layers if h.biased else 1)}
    again = KeyMetadata((h.vocabulary, h.width), torch.bfloat16, optional=True)
    return {"umt5xxl" if h.biased else "t5xxl": {**shapes, **biases, "encoder.embed_tokens.weight": again}}


_CLIP_SIGNS = tuple(f"{_LAYER}.mlp.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias"))
_CLIP = {
    "clip_l": Clip(768, 12, CLIP_TOKENS),
    "clip_g": Clip(1280, 32, CLIP_TOKENS),
    "clip_h": Clip(1024, 23, CLIP_TOKENS),
}
_T5_SIGNS = tuple(f"{_FEED}.{name}.weight" for name in ("wi_0", "wi_1", "wo"))
_T5 = {"t5xxl": T5(4096, 24, 64, 4096, 10240, 32128, 0), "umt5xxl": T5(4096, 24, 64, 4096, 10240, 256384, 1)}

_read_clip = reader(Clip, widens(4, f"{_LAYER}.mlp.fc2.weight"))
_clip = Layout(build_clip, _CLIP_SIGNS, _read_clip, dtype=torch.float16)
register_family(Family("clip", Clip, _CLIP, {"transformers": _clip}))
register_family(Family("t5", T5, _T5, {"transformers": Layout(build_t5, _T5_SIGNS, reader(T5))}))
