"""Wan 2.1 and 2.2: videos from text, and from an image; attention within the video and then to the text."""

from __future__ import annotations

from dataclasses import dataclass

from sd_mecha.builtin.conversions import wan as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, conv, linear, nest, norm, scale
from sd_mecha.builtin.layers.transformers import FREQUENCIES
from sd_mecha.extensions.hyperparameters import count, flag, size

PATCH = (1, 2, 2)
"""Frames, rows and columns of latent pixels that make one token."""
PATCH_SIZE = 4
IMAGE = 1280
"""Channels of the encoded image that some versions attend to."""


@dataclass(frozen=True)
class Wan:
    """Sizes of a Wan.

    Attributes:
        channels: of the latent input; more than of the output where an image is given with it.
        output: channels of the latent output.
        image: whether there is attention to an encoded image.
    """

    width: int = size("blocks.*.self_attn.norm_q.weight", 0, "blocks.*.cross_attn.norm_q.weight")
    inner: int = size("blocks.*.ffn.0.weight", 0, ("blocks.*.ffn.2.weight", 1))
    depth: int = count("blocks")
    channels: int = size("patch_embedding.weight", 1)
    output: int = size("head.head.weight", 0, "head.head.bias", per=PATCH_SIZE)
    context: int = size("text_embedding.0.weight", 1)
    image: int = flag("blocks.*.cross_attn.k_img.weight", "blocks.*.cross_attn.v_img.weight")


def build(h: Wan) -> Shapes:
    """Return the keys in the original layout."""
    width, square = h.width, linear(h.width, h.width)
    attention = dict.fromkeys("qkvo", square) | dict.fromkeys(("norm_q", "norm_k"), scale(width))
    to_image = {"k_img": square, "v_img": square, "norm_k_img": scale(width)}
    block = nest(
        {
            "modulation": (1, 6, width),
            "self_attn": nest(attention),
            "norm3": norm(width),
            "cross_attn": nest(attention | (to_image if h.image else {})),
            "ffn.0": linear(h.inner, width),
            "ffn.2": linear(width, h.inner),
        }
    )
    from_image = {
        "img_emb.proj.0": norm(IMAGE),
        "img_emb.proj.1": linear(IMAGE, IMAGE),
        "img_emb.proj.3": linear(width, IMAGE),
        "img_emb.proj.4": norm(width),
    }
    return nest(
        {
            "patch_embedding": conv(width, h.channels, *PATCH),
            "text_embedding.0": linear(width, h.context),
            "text_embedding.2": square,
            "time_embedding.0": linear(width, FREQUENCIES),
            "time_embedding.2": square,
            "time_projection.1": linear(6 * width, width),
            **{f"blocks.{i}": block for i in range(h.depth)},
            "head.modulation": (1, 2, width),
            "head.head": linear(PATCH_SIZE * h.output, width),
            **(from_image if h.image else {}),
        }
    )


transformer_family.register(
    "wan",
    {
        "wan21_t2v_14b": Wan(5120, 13824, 40, 16, 16, 4096, 0),
        "wan21_t2v_1.3b": Wan(1536, 8960, 30, 16, 16, 4096, 0),
        "wan21_i2v_14b": Wan(5120, 13824, 40, 36, 16, 4096, 1),
        "wan22_i2v_a14b": Wan(5120, 13824, 40, 36, 16, 4096, 0),
        "wan22_ti2v_5b": Wan(3072, 14336, 30, 48, 48, 4096, 0),
    },
    build=build,
    signs=("blocks.*.self_attn.norm_q.weight", "blocks.*.cross_attn.norm_q.weight"),
    rules=lambda h: rules.wan(),
)
