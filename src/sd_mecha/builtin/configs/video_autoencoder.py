"""The autoencoder of Wan 2.1 as a file of its own, which Qwen-Image shares: convolutions over space and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import autoencoders as rules
from sd_mecha.builtin.layers.basic import Shapes, conv, nest
from sd_mecha.extensions.config_families import Family, Keys, Layout, translated
from sd_mecha.extensions.header_views import read_through
from sd_mecha.extensions.hyperparameters import reader, size
from sd_mecha.extensions.model_configs import register_family

WIDTHS = (1, 2, 4, 4)
"""Multiple of the channels of the first level for each level, in all of them."""


@dataclass(frozen=True)
class VideoAutoencoder:
    """Sizes of an autoencoder of videos.

    Attributes:
        latent: channels of an encoded video.
        base: channels of the first level.
    """

    latent: int = size("conv2.weight", 0, ("decoder.conv1.weight", 1), ("conv2.bias", 0))
    base: int = size("encoder.conv1.weight", 0, ("decoder.head.2.weight", 1), ("decoder.head.0.gamma", 0))


def _conv(outputs: int, inputs: int) -> Shapes:
    return conv(outputs, inputs, 3, 3, 3)


def _residual(outputs: int, inputs: int) -> Shapes:
    layers: dict[str, Shapes] = {
        "residual.0": {"gamma": (inputs, 1, 1, 1)},
        "residual.2": _conv(outputs, inputs),
        "residual.3": {"gamma": (outputs, 1, 1, 1)},
        "residual.6": _conv(outputs, outputs),
    }
    return nest(layers | ({"shortcut": conv(outputs, inputs, 1, 1, 1)} if inputs != outputs else {}))


def _middle(width: int) -> Shapes:
    projections = {"to_qkv": conv(3 * width, width, 1, 1), "proj": conv(width, width, 1, 1)}
    attention: Shapes = {"norm.gamma": (width, 1, 1), **nest(projections)}
    return nest({"0": _residual(width, width), "1": attention, "2": _residual(width, width)})


def _resample(outputs: int, inputs: int, frames: int) -> Shapes:
    """A change of size; of the number of frames too where the convolution over time has outputs."""
    over_time = {"time_conv": conv(frames, inputs, 3, 1, 1)} if frames else {}
    return nest({"resample.1": conv(outputs, inputs), **over_time})


def build(h: VideoAutoencoder) -> Mapping[str, Keys]:
    """Return the keys in the original layout."""
    widths = [h.base * multiple for multiple in WIDTHS]
    deepest, last = widths[-1], len(widths) - 1
    down: list[Shapes] = []
    channels = h.base
    for level, width in enumerate(widths):
        down += [_residual(width, channels), _residual(width, width)]
        channels = width
        if level < last:
            down.append(_resample(width, width, width if level else 0))
    up: list[Shapes] = []
    for level, width in reversed(list(enumerate(widths))):
        up += [_residual(width, channels), _residual(width, width), _residual(width, width)]
        channels = width // 2
        if level:
            up.append(_resample(channels, width, 2 * width if level > 1 else 0))
    layers = {
        "encoder.conv1": _conv(h.base, 3),
        **{f"encoder.downsamples.{i}": shapes for i, shapes in enumerate(down)},
        "encoder.middle": _middle(deepest),
        "encoder.head": nest({"0.gamma": (deepest, 1, 1, 1), "2": _conv(2 * h.latent, deepest)}),
        "conv1": conv(2 * h.latent, 2 * h.latent, 1, 1, 1),
        "conv2": conv(h.latent, h.latent, 1, 1, 1),
        "decoder.conv1": _conv(deepest, h.latent),
        "decoder.middle": _middle(deepest),
        **{f"decoder.upsamples.{i}": shapes for i, shapes in enumerate(up)},
        "decoder.head": nest({"0.gamma": (h.base, 1, 1, 1), "2": _conv(3, h.base)}),
    }
    return {"vae": nest(layers)}


_read = reader(
    VideoAutoencoder,
    lambda header: header.count("encoder.downsamples") in (0, 3 * len(WIDTHS) - 1),  # no other levels
)
_SIGNS = ("encoder.downsamples.*.residual.*.weight", "decoder.upsamples.*.residual.*.weight")
_DIFFUSERS_SIGNS = ("encoder.down_blocks.*.norm1.gamma", "decoder.up_blocks.*.resnets.*.norm1.gamma")
register_family(
    Family(
        "videoautoencoder",
        VideoAutoencoder,
        {"wan21_vae": VideoAutoencoder(16, 96)},
        {
            "original": Layout(build, _SIGNS, _read, dtype=torch.float32),
            "diffusers": Layout(
                translated(build, lambda h: rules.videos()),
                _DIFFUSERS_SIGNS,
                read_through(_read, rules.videos()),
                dtype=torch.float32,
            ),
        },
        {("original", "diffusers"): lambda h: rules.videos()},
    )
)
