"""What the diffusers library calls the layers of the UNet and the autoencoder of the original layout.

The functions take keys below the model, such as `input_blocks.0.0.weight`.
"""

from __future__ import annotations

import re

from sd_mecha.builtin.layers.basic import Shapes

_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)")
_RESIDUALS = 2  # per level on the way down; on the way up there is one more
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_LEVEL = re.compile(r"(down|up)\.(\d+)\.(.+)")
_VAE_LAYERS = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
    "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    "mid.attn_1.": "mid_block.attentions.0.to_",  # q, k and v
    "block.": "resnets.",
    "downsample.": "downsamplers.0.",
    "upsample.": "upsamplers.0.",
    "norm_out": "conv_norm_out",
}


def unet_name(key: str) -> str:
    """Return the diffusers name of a key of a UNet with two residual blocks per level.

    >>> unet_name("output_blocks.5.1.transformer_blocks.0.attn1.to_q.weight")
    'up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight'
    >>> unet_name("input_blocks.3.0.op.bias"), unet_name("middle_block.2.in_layers.2.bias")
    ('down_blocks.0.downsamplers.0.conv.bias', 'mid_block.resnets.1.conv1.bias')
    """
    block = _BLOCK.match(key)
    if block is None or key.startswith("input_blocks.0."):
        name = _rename_start(key, _UNET)
    else:
        name = _block_name(block[1] == "input", int(block[2]), block[3], block[4])
    place, resnets, rest = name.partition("resnets.")
    if not resnets:
        return name
    index, _, layer = rest.partition(".")
    return f"{place}resnets.{index}.{_rename_start(layer, _UNET_RESIDUAL)}"


def _block_name(down: bool, number: int, part: str, layer: str) -> str:
    # on the way down the convolution between two levels is a block of its own, on the way up it ends the last one
    if down:
        level, index = divmod(number - 1, _RESIDUALS + 1)
        if index == _RESIDUALS:
            return f"down_blocks.{level}.downsamplers.0.conv.{layer.removeprefix('op.')}"
    else:
        level, index = divmod(number, _RESIDUALS + 1)
        if layer.startswith("conv."):
            return f"up_blocks.{level}.upsamplers.0.{layer}"
    kind = "resnets" if part == "0" else "attentions"
    return f"{'down' if down else 'up'}_blocks.{level}.{kind}.{index}.{layer}"


def vae_name(key: str, levels: int = 4) -> str:
    """Return the diffusers name of a key of an autoencoder with that many levels.

    >>> vae_name("decoder.up.0.block.2.nin_shortcut.weight"), vae_name("encoder.mid.attn_1.q.bias")
    ('decoder.up_blocks.3.resnets.2.conv_shortcut.weight', 'encoder.mid_block.attentions.0.to_q.bias')
    """
    half, _, layer = key.partition(".")
    if half not in ("encoder", "decoder"):
        return key
    place = ""
    if level := _VAE_LEVEL.match(layer):
        # the decoder counts its levels from the outside in the original layout, from the inside in diffusers
        number = int(level[2]) if level[1] == "down" else levels - 1 - int(level[2])
        place, layer = f"{level[1]}_blocks.{number}.", level[3]
    layer = _rename_start(layer, _VAE_LAYERS).replace("nin_shortcut", "conv_shortcut")
    return f"{half}.{place}{layer}"


def diffusers_unet(shapes: Shapes) -> Shapes:
    """Return a UNet of the original layout as diffusers has it."""
    return {unet_name(key): shape for key, shape in shapes.items()}


def diffusers_vae(shapes: Shapes) -> Shapes:
    """Return an autoencoder of the original layout as diffusers has it: attention by matrices, not convolutions."""
    renamed = {vae_name(key): shape for key, shape in shapes.items()}
    return {key: shape[:2] if ".attentions." in key else shape for key, shape in renamed.items()}


def _rename_start(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return key
