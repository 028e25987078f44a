"""The UNet of Stable Diffusion in all its sizes: its keys, and how its sizes are read off a file of either layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sd_mecha.builtin.layers.basic import Shapes
from sd_mecha.builtin.layers.images import unet
from sd_mecha.extensions import hyperparameters
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.hyperparameters import read_by, size

LATENT = 4
WIDTHS = (1, 2, 4, 4)
"""Multiple of the channels of the first level for each level, as far as there are levels."""

SD_DEPTHS = (1, 1, 1, 0)
SDXL_DEPTHS = (0, 2, 10)
REFINER_DEPTHS = (0, 4, 4, 0)
"""Transformer blocks per residual block for each level."""

_ATTENTION = ("input_blocks.*.*", "middle_block.*", "output_blocks.*.*")
_ATTENTION_THERE = ("down_blocks.*.attentions.*", "mid_block.attentions.*", "up_blocks.*.attentions.*")
_TRANSFORMERS = [f"{place}.transformer_blocks" for place in (*_ATTENTION, *_ATTENTION_THERE)]
SIGNS, SIGNS_THERE = (
    tuple(f"{place}.transformer_blocks.*.attn2.to_{part}.weight" for place in places for part in "kv")
    for places in (_ATTENTION, _ATTENTION_THERE)
)
"""Patterns of keys, one of which every file has: in the original layout, and in that of diffusers."""

_PROJECTIONS = [
    f"{place}.{name}.weight" for place in (*_ATTENTION, *_ATTENTION_THERE) for name in ("proj_in", "proj_out")
]
_LABELS = ("label_emb.0.0", "add_embedding.linear_1", "class_embedding.linear_1")
_LABELS_THEN = ("label_emb.0.2", "add_embedding.linear_2", "class_embedding.linear_2")


def _labels(header: Header) -> int:
    first, *others = (f"{name}.weight" for name in _LABELS)
    has_labels = header.has(*(f"{name}.{kind}" for name in (*_LABELS, *_LABELS_THEN) for kind in ("weight", "bias")))
    return header.size(first, 1, *others) if has_labels else 0


@dataclass(frozen=True)
class UNet:
    """Sizes of a UNet.

    Attributes:
        inputs: channels of the input: 4 for a latent image alone, 9 with a masked image and its mask, 8 with an image
            to be edited, 5 with its depth.
        base: channels of the first level.
        context: channels of the text.
        labels: channels of the vector of further conditions, 0 for none.
        linear: whether linear layers rather than 1x1 convolutions surround the transformer blocks.
    """

    inputs: int = size("input_blocks.0.0.weight", 1, "conv_in.weight")
    base: int = size(
        "input_blocks.0.0.weight",
        0,
        "conv_in.weight",
        *((f"{name}.weight", 1) for name in ("time_embed.0", "time_embedding.linear_1", "out.2", "conv_out")),
    )
    context: int = size(SIGNS[0], 1, *SIGNS[1:], *SIGNS_THERE)
    labels: int = read_by(_labels)
    linear: int = read_by(lambda header: int(len(header.shape(*_PROJECTIONS)) == 2))


SD1 = UNet(4, 320, 768, 0, 0)
SDXL = UNet(4, 320, 2048, 2816, 1)


def build(h: UNet, depths: tuple[int, ...]) -> Shapes:
    """Return the keys in the original layout.

    Args:
        h: the sizes.
        depths: transformer blocks per residual block for each level.
    """
    return unet(
        latent=LATENT,
        inputs=h.inputs,
        base=h.base,
        widths=WIDTHS[: len(depths)],
        depths=depths,
        context=h.context,
        labels=h.labels,
        linear_projections=bool(h.linear),
    )


def reader(depths: tuple[int, ...]) -> Callable[[Header], UNet]:
    """Return the function that reads the sizes off a file.

    Args:
        depths: transformer blocks per residual block for each level; other UNets are refused.
    """

    def check(header: Header) -> bool:
        # a level has two residual blocks and the step to the next; diffusers counts them as one
        blocks = max(header.count("input_blocks"), 3 * header.count("down_blocks"))
        return (blocks, max(map(header.count, _TRANSFORMERS))) == (3 * len(depths), max(depths))

    return hyperparameters.reader(UNet, check)
