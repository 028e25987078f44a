"""Keys and shapes of the text encoders of diffusion models, in the layouts of the libraries that they come from."""

from __future__ import annotations

from sd_mecha.builtin.layers.basic import Shapes, linear, nest, norm

CLIP_TOKENS = 77


def clip_text(width: int, layers: int, tokens: int = CLIP_TOKENS, vocabulary: int = 49408) -> Shapes:
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


def open_clip_text(width: int, layers: int, tokens: int = CLIP_TOKENS, vocabulary: int = 49408) -> Shapes:
    """A CLIP text encoder as OpenCLIP names it: the attention in one matrix, the projection to be transposed."""
    layer = nest(
        {
            "ln_1": norm(width),
            "attn": {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)},
            "attn.out_proj": linear(width, width),
            "ln_2": norm(width),
            "mlp.c_fc": linear(4 * width, width),
            "mlp.c_proj": linear(width, 4 * width),
        }
    )
    return {
        "positional_embedding": (tokens, width),
        "text_projection": (width, width),
        "logit_scale": (),
        **nest(
            {
                "token_embedding": {"weight": (vocabulary, width)},
                **{f"transformer.resblocks.{i}": layer for i in range(layers)},
                "ln_final": norm(width),
            }
        ),
    }


def t5_encoder(
    width: int, layers: int, heads: int, head_width: int, feed_forward: int, vocabulary: int, buckets: int = 32
) -> Shapes:
    """The encoder of a T5 model of version 1.1 as the transformers library names it.

    Args:
        width: channels between the layers.
        layers: number of layers.
        heads: attention heads per layer.
        head_width: channels per head.
        feed_forward: channels inside a feed-forward layer; values and gates have as many each.
        vocabulary: number of tokens.
        buckets: ranges of distances that have a bias of their own; the first layer holds them for all.
    """
    inner = heads * head_width
    layer = nest(
        {
            **{f"layer.0.SelfAttention.{name}": linear(inner, width, bias=False) for name in ("q", "k", "v")},
            "layer.0.SelfAttention.o": linear(width, inner, bias=False),
            "layer.0.layer_norm": {"weight": (width,)},
            "layer.1.DenseReluDense.wi_0": linear(feed_forward, width, bias=False),
            "layer.1.DenseReluDense.wi_1": linear(feed_forward, width, bias=False),
            "layer.1.DenseReluDense.wo": linear(width, feed_forward, bias=False),
            "layer.1.layer_norm": {"weight": (width,)},
        }
    )
    return nest(
        {
            "shared": {"weight": (vocabulary, width)},
            **{f"encoder.block.{i}": layer for i in range(layers)},
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": {"weight": (buckets, heads)},
            "encoder.final_layer_norm": {"weight": (width,)},
        }
    )


def t5_xxl() -> Shapes:
    """The largest T5, which many models have as a text encoder."""
    return t5_encoder(4096, 24, 64, 64, 10240, 32128)
