"""One weight per block of a UNet, by the names that block-weighted merging has always used."""

from __future__ import annotations

from functools import partial

from sd_mecha.extensions.model_configs import BuiltModelConfig, KeyMetadata, register


def block_weights(depth: int, *, vae: bool) -> dict[str, dict[str, KeyMetadata]]:
    """Return the component of a UNet with that many input and as many output blocks."""
    inputs, outputs = ([f"{way}{i:02}" for i in range(depth)] for way in ("IN", "OUT"))
    names = ["BASE", *inputs, "M00", *outputs, *(["VAE"] if vae else [])]
    return {"blocks": dict.fromkeys(names, KeyMetadata((), "float32"))}


_SIGNS = ("BASE", "IN", "M00", "OUT", "VAE")
register(BuiltModelConfig("sd1-supermerger_blocks", partial(block_weights, 12, vae=False), _SIGNS))
register(BuiltModelConfig("sdxl-supermerger_blocks", partial(block_weights, 9, vae=True), _SIGNS))
