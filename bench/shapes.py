"""Tensor names and shapes of the checkpoints that are merged, from a few numbers each.

Latent-diffusion checkpoints are regular: a U-Net of levels, one or two text encoders and an autoencoder. What
is written here are the rules, so the benchmark needs no listing of thousands of names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Named = tuple[str, Shape]


@dataclass(frozen=True)
class UNet:
    """The numbers that make a U-Net of this family."""

    channels: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    """Transformer blocks per level; 0 for none."""
    context: int
    linear_projection: bool
    class_labels: int = 0


SD15_UNET = UNet(320, (1, 2, 4, 4), (1, 1, 1, 0), 768, linear_projection=False)
SDXL_UNET = UNet(320, (1, 2, 4), (0, 2, 10), 2048, linear_projection=True, class_labels=2816)


def sd15() -> dict[str, Shape]:
    """Stable Diffusion 1.5, 2.1 GB in fp16."""
    return dict(
        [
            *clip("cond_stage_model.transformer."),
            *autoencoder("first_stage_model."),
            *unet(SD15_UNET, "model.diffusion_model."),
        ]
    )


def sdxl() -> dict[str, Shape]:
    """Stable Diffusion XL base, 6.9 GB in fp16."""
    return dict(
        [
            *clip("conditioner.embedders.0.transformer."),
            *open_clip("conditioner.embedders.1.model."),
            *autoencoder("first_stage_model."),
            *unet(SDXL_UNET, "model.diffusion_model."),
        ]
    )


def layer(name: str, *weight: int, bias: bool = True) -> Iterator[Named]:
    """A linear, convolution or norm layer: its weight, and a bias as long as the weight's first side."""
    if bias:
        yield f"{name}.bias", weight[:1]
    yield f"{name}.weight", weight


def unet(spec: UNet, prefix: str) -> Iterator[Named]:
    time = spec.channels * 4

    def residual(at: str, into: int, out: int) -> Iterator[Named]:
        yield from layer(f"{at}.in_layers.0", into)
        yield from layer(f"{at}.in_layers.2", out, into, 3, 3)
        yield from layer(f"{at}.emb_layers.1", out, time)
        yield from layer(f"{at}.out_layers.0", out)
        yield from layer(f"{at}.out_layers.3", out, out, 3, 3)
        if into != out:
            yield from layer(f"{at}.skip_connection", out, into, 1, 1)

    def attention(at: str, width: int, depth: int) -> Iterator[Named]:
        kernel = () if spec.linear_projection else (1, 1)
        yield from layer(f"{at}.norm", width)
        yield from layer(f"{at}.proj_in", width, width, *kernel)
        for block in (f"{at}.transformer_blocks.{i}" for i in range(depth)):
            for attn, source in (("attn1", width), ("attn2", spec.context)):
                yield from layer(f"{block}.{attn}.to_q", width, width, bias=False)
                yield from layer(f"{block}.{attn}.to_k", width, source, bias=False)
                yield from layer(f"{block}.{attn}.to_v", width, source, bias=False)
                yield from layer(f"{block}.{attn}.to_out.0", width, width)
            yield from layer(f"{block}.ff.net.0.proj", width * 8, width)
            yield from layer(f"{block}.ff.net.2", width, width * 4)
            for norm in ("norm1", "norm2", "norm3"):
                yield from layer(f"{block}.{norm}", width)
        yield from layer(f"{at}.proj_out", width, width, *kernel)

    embeddings = [("time_embed", spec.channels)]
    if spec.class_labels:
        embeddings.append(("label_emb.0", spec.class_labels))
    for name, into in embeddings:
        yield from layer(f"{prefix}{name}.0", time, into)
        yield from layer(f"{prefix}{name}.2", time, time)

    width, block = spec.channels, 1
    skips = [width]
    yield from layer(f"{prefix}input_blocks.0.0", width, 4, 3, 3)
    for level, (multiplier, depth) in enumerate(zip(spec.multipliers, spec.depths, strict=True)):
        for _ in range(2):
            out = spec.channels * multiplier
            yield from residual(f"{prefix}input_blocks.{block}.0", width, out)
            if depth:
                yield from attention(f"{prefix}input_blocks.{block}.1", out, depth)
            width, block = out, block + 1
            skips.append(width)
        if level < len(spec.multipliers) - 1:
            yield from layer(f"{prefix}input_blocks.{block}.0.op", width, width, 3, 3)
            block += 1
            skips.append(width)

    yield from residual(f"{prefix}middle_block.0", width, width)
    yield from attention(f"{prefix}middle_block.1", width, max(spec.depths[-1], 1))
    yield from residual(f"{prefix}middle_block.2", width, width)

    block = 0
    for level in reversed(range(len(spec.multipliers))):
        for position in range(3):
            out, depth = spec.channels * spec.multipliers[level], spec.depths[level]
            yield from residual(f"{prefix}output_blocks.{block}.0", width + skips.pop(), out)
            if depth:
                yield from attention(f"{prefix}output_blocks.{block}.1", out, depth)
            if level and position == 2:
                yield from layer(f"{prefix}output_blocks.{block}.{2 if depth else 1}.conv", out, out, 3, 3)
            width, block = out, block + 1
    yield from layer(f"{prefix}out.0", spec.channels)
    yield from layer(f"{prefix}out.2", 4, spec.channels, 3, 3)


def clip(prefix: str) -> Iterator[Named]:
    at = f"{prefix}text_model"
    yield f"{at}.embeddings.token_embedding.weight", (49408, 768)
    yield f"{at}.embeddings.position_embedding.weight", (77, 768)
    for block in (f"{at}.encoder.layers.{i}" for i in range(12)):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from layer(f"{block}.self_attn.{projection}", 768, 768)
        yield from layer(f"{block}.mlp.fc1", 3072, 768)
        yield from layer(f"{block}.mlp.fc2", 768, 3072)
        for norm in ("layer_norm1", "layer_norm2"):
            yield from layer(f"{block}.{norm}", 768)
    yield from layer(f"{at}.final_layer_norm", 768)


def open_clip(prefix: str) -> Iterator[Named]:
    width = 1280
    yield f"{prefix}token_embedding.weight", (49408, width)
    yield f"{prefix}positional_embedding", (77, width)
    yield f"{prefix}text_projection", (width, width)
    yield f"{prefix}logit_scale", ()
    for block in (f"{prefix}transformer.resblocks.{i}" for i in range(32)):
        yield f"{block}.attn.in_proj_weight", (width * 3, width)
        yield f"{block}.attn.in_proj_bias", (width * 3,)
        yield from layer(f"{block}.attn.out_proj", width, width)
        yield from layer(f"{block}.mlp.c_fc", width * 4, width)
        yield from layer(f"{block}.mlp.c_proj", width, width * 4)
        for norm in ("ln_1", "ln_2"):
            yield from layer(f"{block}.{norm}", width)
    yield from layer(f"{prefix}ln_final", width)


def autoencoder(prefix: str) -> Iterator[Named]:
    widths = (128, 256, 512, 512)

    def residual(at: str, into: int, out: int) -> Iterator[Named]:
        for number, source in ((1, into), (2, out)):
            yield from layer(f"{at}.norm{number}", source)
            yield from layer(f"{at}.conv{number}", out, source, 3, 3)
        if into != out:
            yield from layer(f"{at}.nin_shortcut", out, into, 1, 1)

    def middle(at: str) -> Iterator[Named]:
        yield from residual(f"{at}.block_1", 512, 512)
        yield from layer(f"{at}.attn_1.norm", 512)
        for projection in ("q", "k", "v", "proj_out"):
            yield from layer(f"{at}.attn_1.{projection}", 512, 512, 1, 1)
        yield from residual(f"{at}.block_2", 512, 512)

    width = widths[0]
    yield from layer(f"{prefix}encoder.conv_in", width, 3, 3, 3)
    for level, out in enumerate(widths):
        for block in range(2):
            yield from residual(f"{prefix}encoder.down.{level}.block.{block}", width, out)
            width = out
        if level < 3:
            yield from layer(f"{prefix}encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from middle(f"{prefix}encoder.mid")
    yield from layer(f"{prefix}encoder.norm_out", width)
    yield from layer(f"{prefix}encoder.conv_out", 8, width, 3, 3)

    yield from layer(f"{prefix}decoder.conv_in", width, 4, 3, 3)
    yield from middle(f"{prefix}decoder.mid")
    for level, out in reversed(list(enumerate(widths))):
        for block in range(3):
            yield from residual(f"{prefix}decoder.up.{level}.block.{block}", width, out)
            width = out
        if level:
            yield from layer(f"{prefix}decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from layer(f"{prefix}decoder.norm_out", width)
    yield from layer(f"{prefix}decoder.conv_out", 3, width, 3, 3)

    yield from layer(f"{prefix}quant_conv", 8, 8, 1, 1)
    yield from layer(f"{prefix}post_quant_conv", 4, 4, 1, 1)
