"""Autoencoders, from the original layout to that of diffusers."""

from __future__ import annotations

from collections.abc import Iterable

from sd_mecha.builtin.layers.diffusers_names import vae_name
from sd_mecha.extensions.layouts import Rule, keep, rename, squeeze

_UP = 4  # three residual blocks on each level of the way up, and the step to the next level


def images(keys: Iterable[str]) -> list[Rule]:
    """The autoencoder of images that has these keys; its attention has convolutions here, matrices there.

    >>> images(["encoder.mid.attn_1.q.bias"])[0].targets
    ('encoder.mid_block.attentions.0.to_q',)
    """
    names = {key.rpartition(".")[0]: vae_name(key).rpartition(".")[0] for key in keys}
    changed = [(squeeze if ".attn_1." in name else rename)(name, there) for name, there in names.items()]
    return [*changed, *keep("bn")]


def videos() -> list[Rule]:
    """The autoencoder of videos."""
    return [
        rename("conv1", "quant_conv"),
        rename("conv2", "post_quant_conv"),
        *(rule for half in ("encoder", "decoder") for rule in _half(half)),
        rename("encoder.downsamples.*", "encoder.down_blocks.*"),
        *_residual("encoder.downsamples.*", "encoder.down_blocks.*"),
        *(rule for number in range(4 * _UP - 1) for rule in _up(number)),
    ]


def _half(half: str) -> list[Rule]:
    middle, there = f"{half}.middle", f"{half}.mid_block"
    return [
        rename(f"{half}.conv1", f"{half}.conv_in"),
        *_residual(f"{middle}.0", f"{there}.resnets.0"),
        rename(f"{middle}.1", f"{there}.attentions.0"),
        *_residual(f"{middle}.2", f"{there}.resnets.1"),
        rename(f"{half}.head.0", f"{half}.norm_out"),
        rename(f"{half}.head.2", f"{half}.conv_out"),
    ]


def _up(number: int) -> list[Rule]:
    level, index = divmod(number, _UP)
    block = f"decoder.upsamples.{number}"
    if index == _UP - 1:
        return [rename(block, f"decoder.up_blocks.{level}.upsamplers.0")]
    return _residual(block, f"decoder.up_blocks.{level}.resnets.{index}")


def _residual(block: str, there: str) -> list[Rule]:
    names = {
        "residual.0": "norm1",
        "residual.2": "conv1",
        "residual.3": "norm2",
        "residual.6": "conv2",
        "shortcut": "conv_shortcut",
    }
    return [rename(f"{block}.{name}", f"{there}.{new}") for name, new in names.items()]
