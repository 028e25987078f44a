"""Autoencoders of images as files of their own: those of Stable Diffusion and Flux."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import autoencoders as rules
from sd_mecha.builtin.layers.images import VAE_WIDTHS, vae
from sd_mecha.extensions.config_families import Family, Keys, Layout, translated
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.hyperparameters import flag, read_by, reader, size
from sd_mecha.extensions.layouts import Rule
from sd_mecha.extensions.model_configs import KeyMetadata, register_family

PATCH = 4
"""Pixels of the latent image that Flux.2 takes together; their channels have one mean and variance each."""

_LEVELS = ("encoder.down", "decoder.up")
_LEVELS_THERE = ("encoder.down_blocks", "decoder.up_blocks")
_QUANTIZED = tuple(f"{name}.{kind}" for name in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias"))
_STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


def _latent(header: Header) -> int:
    weights = ("decoder.conv_in.weight", 1), ("post_quant_conv.weight", 0), ("post_quant_conv.bias", 0)
    known = [place for place in weights if header.sized(place[0])]
    return header.either(*known) if known else header.size("encoder.conv_out.weight", 0) // 2


@dataclass(frozen=True)
class Autoencoder:
    """Sizes of an autoencoder of images; the layers that tell them have one name in all layouts.

    Attributes:
        latent: channels of an encoded image.
        base: channels of the first level.
        quantized: whether 1x1 convolutions stand between the latent space and either half.
        normed: whether encoded images are normalised by means and variances that it holds.
    """

    latent: int = read_by(_latent)
    base: int = size("encoder.conv_in.weight", 0, ("decoder.conv_out.weight", 1))
    quantized: int = flag(*_QUANTIZED)
    normed: int = flag(*_STATISTICS)


def build(h: Autoencoder) -> Mapping[str, Keys]:
    """Return the keys in the original layout."""
    return {"vae": vae(latent=h.latent, base=h.base, quantized=bool(h.quantized))}


def statistics(h: Autoencoder) -> Mapping[str, Keys]:
    """Return the means and variances of encoded images, which both layouts name alike."""
    seen, counted = KeyMetadata((PATCH * h.latent,), torch.float32), KeyMetadata((), torch.int64)
    return {"vae": dict(zip(_STATISTICS, (seen, seen, counted), strict=True))} if h.normed else {}


def _there(h: Autoencoder) -> list[Rule]:
    return rules.images(build(h)["vae"])


def _check(header: Header) -> bool:
    return {header.count(name) for name in (*_LEVELS, *_LEVELS_THERE)} <= {0, len(VAE_WIDTHS)}


_SIGNS = tuple(f"{level}.*.block.*.conv{n}.weight" for level in _LEVELS for n in (1, 2))
_SIGNS_THERE = tuple(f"{level}.*.resnets.*.norm{n}.weight" for level in _LEVELS_THERE for n in (1, 2))
_read = reader(Autoencoder, _check)
_original = Layout(build, _SIGNS, _read, dtype=torch.float32, others=statistics)
_diffusers = Layout(translated(build, _there), _SIGNS_THERE, _read, dtype=torch.float32, others=statistics)
register_family(
    Family(
        "autoencoder",
        Autoencoder,
        {
            "sd_vae": Autoencoder(4, 128, 1, 0),
            "flux1_vae": Autoencoder(16, 128, 0, 0),
            "flux2_vae": Autoencoder(32, 128, 1, 1),
        },
        {"original": _original, "diffusers": _diffusers},
        {("original", "diffusers"): _there},
    )
)
