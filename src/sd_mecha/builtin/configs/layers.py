"""Keys and shapes of the layers that latent diffusion models of the original (CompVis) layout are made of.

Each function returns key -> shape below the layer; `nest` puts layers under names.
"""

from __future__ import annotations

from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]


def nest(layers: Mapping[str | int, Shapes]) -> Shapes:
    """Prefix the keys of each layer with its name."""
    return {f"{name}.{key}": shape for name, shapes in layers.items() for key, shape in shapes.items()}


def conv(outputs: int, inputs: int, kernel: int = 3) -> Shapes:
    return {"weight": (outputs, inputs, kernel, kernel), "bias": (outputs,)}


def linear(outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})


def norm(channels: int) -> Shapes:
    return {"weight": (channels,), "bias": (channels,)}


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


def spatial_transformer(width: int, context: int, depth: int) -> Shapes:
    """Transformer blocks over the pixels of a feature map, between 1x1 convolutions."""
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
            "proj_in": conv(width, width, 1),
            "proj_out": conv(width, width, 1),
            **{f"transformer_blocks.{i}": block for i in range(depth)},
        }
    )


def unet_residual(outputs: int, inputs: int, embedding: int) -> Shapes:
    layers: dict[str | int, Shapes] = {
        "in_layers.0": norm(inputs),
        "in_layers.2": conv(outputs, inputs),
        "emb_layers.1": linear(outputs, embedding),
        "out_layers.0": norm(outputs),
        "out_layers.3": conv(outputs, outputs),
    }
    if inputs != outputs:
        layers["skip_connection"] = conv(outputs, inputs, 1)
    return nest(layers)


def unet(*, latent: int, base: int, widths: tuple[int, ...], depths: tuple[int, ...], context: int) -> Shapes:
    """A UNet with two residual blocks per level on the way down and three on the way up.

    Args:
        latent: channels of the input and output.
        base: channels of the first level.
        widths: multiple of `base` for each level.
        depths: transformer blocks per residual block for each level; the middle has as many as the deepest
            level that has any.
        context: channels of the text that is attended to.
    """
    embedding = 4 * base
    residuals = 2
    levels = [(base * multiple, depth) for multiple, depth in zip(widths, depths, strict=True)]
    layers: dict[str | int, Shapes] = {
        "time_embed.0": linear(embedding, base),
        "time_embed.2": linear(embedding, embedding),
        "input_blocks.0.0": conv(base, latent),
    }
    channels, block = base, 1
    skipped = [base]  # channels that each output block takes over from the way down
    for level, (width, depth) in enumerate(levels):
        for _ in range(residuals):
            layers[f"input_blocks.{block}.0"] = unet_residual(width, channels, embedding)
            if depth:
                layers[f"input_blocks.{block}.1"] = spatial_transformer(width, context, depth)
            channels, block = width, block + 1
            skipped.append(channels)
        if level + 1 < len(levels):
            layers[f"input_blocks.{block}.0.op"] = conv(channels, channels)
            block += 1
            skipped.append(channels)
    layers["middle_block.0"] = unet_residual(channels, channels, embedding)
    layers["middle_block.1"] = spatial_transformer(channels, context, [depth for depth in depths if depth][-1])
    layers["middle_block.2"] = unet_residual(channels, channels, embedding)
    block = 0
    for level, (width, depth) in reversed(list(enumerate(levels))):
        for index in range(residuals + 1):
            layers[f"output_blocks.{block}.0"] = unet_residual(width, channels + skipped.pop(), embedding)
            if depth:
                layers[f"output_blocks.{block}.1"] = spatial_transformer(width, context, depth)
            if index == residuals and level:
                layers[f"output_blocks.{block}.{2 if depth else 1}.conv"] = conv(width, width)
            channels, block = width, block + 1
    layers["out.0"] = norm(channels)
    layers["out.2"] = conv(latent, channels)
    return nest(layers)


def vae_residual(outputs: int, inputs: int) -> Shapes:
    layers: dict[str | int, Shapes] = {
        "norm1": norm(inputs),
        "conv1": conv(outputs, inputs),
        "norm2": norm(outputs),
        "conv2": conv(outputs, outputs),
    }
    if inputs != outputs:
        layers["nin_shortcut"] = conv(outputs, inputs, 1)
    return nest(layers)


def vae_middle(width: int) -> Shapes:
    attention_layers: dict[str | int, Shapes] = {name: conv(width, width, 1) for name in ("q", "k", "v", "proj_out")}
    return nest(
        {
            "block_1": vae_residual(width, width),
            "attn_1": nest({"norm": norm(width), **attention_layers}),
            "block_2": vae_residual(width, width),
        }
    )


def vae(*, latent: int, base: int, widths: tuple[int, ...]) -> Shapes:
    """An autoencoder from three colour channels to `latent` channels and back."""
    last = len(widths) - 1
    deepest = base * widths[-1]
    encoder: dict[str | int, Shapes] = {"conv_in": conv(base, 3)}
    channels = base
    for level, multiple in enumerate(widths):
        for index in range(2):
            encoder[f"down.{level}.block.{index}"] = vae_residual(base * multiple, channels)
            channels = base * multiple
        if level < last:
            encoder[f"down.{level}.downsample.conv"] = conv(channels, channels)
    encoder |= {"mid": vae_middle(deepest), "norm_out": norm(deepest), "conv_out": conv(2 * latent, deepest)}

    decoder: dict[str | int, Shapes] = {"conv_in": conv(deepest, latent), "mid": vae_middle(deepest)}
    channels = deepest
    for level, multiple in reversed(list(enumerate(widths))):
        for index in range(3):
            decoder[f"up.{level}.block.{index}"] = vae_residual(base * multiple, channels)
            channels = base * multiple
        if level:
            decoder[f"up.{level}.upsample.conv"] = conv(channels, channels)
    decoder |= {"norm_out": norm(channels), "conv_out": conv(3, channels)}
    return nest(
        {
            "encoder": nest(encoder),
            "decoder": nest(decoder),
            "quant_conv": conv(2 * latent, 2 * latent, 1),
            "post_quant_conv": conv(latent, latent, 1),
        }
    )


def clip_text(*, width: int, layers: int, tokens: int = 77, vocabulary: int = 49408) -> Shapes:
    """The transformer of a CLIP text encoder as the transformers library names it, without `position_ids`."""
    layer = nest(
        {
            "layer_norm1": norm(width),
            **{f"self_attn.{name}": linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
            "layer_norm2": norm(width),
            "mlp.fc1": linear(4 * width, width),
            "mlp.fc2": linear(width, 4 * width),
        }
    )
    return nest(
        {
            "embeddings.token_embedding": {"weight": (vocabulary, width)},
            "embeddings.position_embedding": {"weight": (tokens, width)},
            **{f"encoder.layers.{i}": layer for i in range(layers)},
            "final_layer_norm": norm(width),
        }
    )
