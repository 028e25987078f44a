"""Keys and shapes of the UNet and the autoencoder of images of the original layout."""

from __future__ import annotations

from functools import partial

from sd_mecha.builtin.layers.basic import Shapes, conv, linear, nest, norm

VAE_WIDTHS = (1, 2, 4, 4)
"""Multiple of the channels of the first level for each level of the autoencoders of images."""


def attention(width: int, context: int) -> Shapes:
    """Cross-attention from `width` channels to `context` channels."""
    return nest(
        {
            "to_q": linear(width, width, bias=False),
            "to_k": linear(width, context, bias=False),
            "to_v": linear(width, context, bias=False),
            "to_out.0": linear(width, width),
        }
    )


def spatial_transformer(width: int, context: int, depth: int, *, linear_projections: bool = False) -> Shapes:
    """Transformer blocks over the pixels of a feature map, between 1x1 convolutions or linear layers."""
    projection = linear(width, width) if linear_projections else conv(width, width, 1, 1)
    block = nest(
        {
            "norm1": norm(width),
            "attn1": attention(width, width),
            "norm2": norm(width),
            "attn2": attention(width, context),
            "norm3": norm(width),
            "ff.net.0.proj": linear(8 * width, width),  # values and gates, each four times as wide
            "ff.net.2": linear(width, 4 * width),
        }
    )
    return nest(
        {
            "norm": norm(width),
            "proj_in": projection,
            "proj_out": projection,
            **{f"transformer_blocks.{i}": block for i in range(depth)},
        }
    )


def unet_residual(outputs: int, inputs: int, embedding: int) -> Shapes:
    layers: dict[str, Shapes] = {
        "in_layers.0": norm(inputs),
        "in_layers.2": conv(outputs, inputs),
        "emb_layers.1": linear(outputs, embedding),
        "out_layers.0": norm(outputs),
        "out_layers.3": conv(outputs, outputs),
    }
    if inputs != outputs:
        layers["skip_connection"] = conv(outputs, inputs, 1, 1)
    return nest(layers)


def unet(
    *,
    latent: int,
    base: int,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    context: int,
    labels: int = 0,
    linear_projections: bool = False,
    inputs: int | None = None,
) -> Shapes:
    """A UNet with two residual blocks per level on the way down and three on the way up.

    Args:
        latent: channels of the output, and of the input unless `inputs` says otherwise.
        base: channels of the first level.
        widths: multiple of `base` for each level.
        depths: transformer blocks per residual block for each level; the middle has as many as the deepest
            level that has any.
        context: channels of the text that is attended to.
        labels: channels of the vector of further conditions that joins the time, 0 for none.
        linear_projections: whether linear layers rather than 1x1 convolutions surround the transformer blocks.
        inputs: channels of the input, by default as many as of the output.
    """
    transformer = partial(spatial_transformer, context=context, linear_projections=linear_projections)
    embedding = 4 * base
    residuals = 2
    levels = [(base * multiple, depth) for multiple, depth in zip(widths, depths, strict=True)]
    layers: dict[str, Shapes] = {
        "time_embed.0": linear(embedding, base),
        "time_embed.2": linear(embedding, embedding),
        "input_blocks.0.0": conv(base, latent if inputs is None else inputs),
    }
    if labels:
        layers["label_emb.0.0"] = linear(embedding, labels)
        layers["label_emb.0.2"] = linear(embedding, embedding)
    channels, block = base, 1
    skipped = [base]  # channels that each output block takes over from the way down
    for level, (width, depth) in enumerate(levels):
        for _ in range(residuals):
            layers[f"input_blocks.{block}.0"] = unet_residual(width, channels, embedding)
            if depth:
                layers[f"input_blocks.{block}.1"] = transformer(width, depth=depth)
            channels, block = width, block + 1
            skipped.append(channels)
        if level + 1 < len(levels):
            layers[f"input_blocks.{block}.0.op"] = conv(channels, channels)
            block += 1
            skipped.append(channels)
    layers["middle_block.0"] = unet_residual(channels, channels, embedding)
    layers["middle_block.1"] = transformer(channels, depth=[depth for depth in depths if depth][-1])
    layers["middle_block.2"] = unet_residual(channels, channels, embedding)
    block = 0
    for level, (width, depth) in reversed(list(enumerate(levels))):
        for index in range(residuals + 1):
            layers[f"output_blocks.{block}.0"] = unet_residual(width, channels + skipped.pop(), embedding)
            if depth:
                layers[f"output_blocks.{block}.1"] = transformer(width, depth=depth)
            if index == residuals and level:
                layers[f"output_blocks.{block}.{2 if depth else 1}.conv"] = conv(width, width)
            channels, block = width, block + 1
    layers["out.0"] = norm(channels)
    layers["out.2"] = conv(latent, channels)
    return nest(layers)


def vae_residual(outputs: int, inputs: int) -> Shapes:
    layers: dict[str, Shapes] = {
        "norm1": norm(inputs),
        "conv1": conv(outputs, inputs),
        "norm2": norm(outputs),
        "conv2": conv(outputs, outputs),
    }
    if inputs != outputs:
        layers["nin_shortcut"] = conv(outputs, inputs, 1, 1)
    return nest(layers)


def vae_middle(width: int) -> Shapes:
    attention_layers: dict[str, Shapes] = {name: conv(width, width, 1, 1) for name in ("q", "k", "v", "proj_out")}
    return nest(
        {
            "block_1": vae_residual(width, width),
            "attn_1": nest({"norm": norm(width), **attention_layers}),
            "block_2": vae_residual(width, width),
        }
    )


def vae(*, latent: int, base: int = 128, widths: tuple[int, ...] = VAE_WIDTHS, quantized: bool = True) -> Shapes:
    """An autoencoder from three colour channels to `latent` channels and back.

    Args:
        latent: channels of an encoded image.
        base: channels of the first level.
        widths: multiple of `base` for each level.
        quantized: whether 1x1 convolutions stand between the latent space and either half.
    """
    last = len(widths) - 1
    deepest = base * widths[-1]
    encoder: dict[str, Shapes] = {"conv_in": conv(base, 3)}
    channels = base
    for level, multiple in enumerate(widths):
        for index in range(2):
            encoder[f"down.{level}.block.{index}"] = vae_residual(base * multiple, channels)
            channels = base * multiple
        if level < last:
            encoder[f"down.{level}.downsample.conv"] = conv(channels, channels)
    encoder |= {"mid": vae_middle(deepest), "norm_out": norm(deepest), "conv_out": conv(2 * latent, deepest)}

    decoder: dict[str, Shapes] = {"conv_in": conv(deepest, latent), "mid": vae_middle(deepest)}
    channels = deepest
    for level, multiple in reversed(list(enumerate(widths))):
        for index in range(3):
            decoder[f"up.{level}.block.{index}"] = vae_residual(base * multiple, channels)
            channels = base * multiple
        if level:
            decoder[f"up.{level}.upsample.conv"] = conv(channels, channels)
    decoder |= {"norm_out": norm(channels), "conv_out": conv(3, channels)}
    halves: dict[str, Shapes] = {"encoder": nest(encoder), "decoder": nest(decoder)}
    if quantized:
        halves |= {"quant_conv": conv(2 * latent, 2 * latent, 1, 1), "post_quant_conv": conv(latent, latent, 1, 1)}
    return nest(halves)
