"""Keys and shapes of the layers of diffusion transformers."""

from __future__ import annotations

from sd_mecha.builtin.layers.basic import Shapes, linear, nest, unbiased

FREQUENCIES = 256
"""Sines and cosines that a time step, or another number, is described with."""


def modulation(width: int, inputs: int, parts: int) -> Shapes:
    """A linear layer that makes `parts` vectors of shifts, scales and gates from a vector of conditions."""
    return linear(parts * width, inputs)


def final_layer(width: int, outputs: int) -> Shapes:
    """The layer that turns tokens back into patches, under the control of the conditions."""
    return nest({"linear": linear(outputs, width), "adaLN_modulation.1": modulation(width, width, 2)})


def two_layers(first: str, second: str, width: int, inputs: int, inner: int | None = None) -> Shapes:
    """Two linear layers of those names, by default as wide as the model in between.

    They bring a number or a vector to the width of the model, or are a feed-forward layer.
    """
    inner = width if inner is None else inner
    return nest({first: linear(inner, inputs), second: linear(width, inner)})


def embedder(width: int, inputs: int) -> Shapes:
    """Two linear layers that bring a vector of conditions to the width of the model."""
    return two_layers("in_layer", "out_layer", width, inputs)


def feed_forward(width: int, mlp_ratio: int = 4) -> Shapes:
    """A feed-forward layer as diffusers names it."""
    return two_layers("net.0.proj", "net.2", width, width, mlp_ratio * width)


def gated_feed_forward(width: int, inner: int) -> Shapes:
    """A feed-forward layer of values and gates without biases."""
    return unbiased(nest({"w1": linear(inner, width), "w2": linear(width, inner), "w3": linear(inner, width)}))


def query_key_norm(head: int) -> Shapes:
    """The scales of the normalised queries and keys of Flux, shared by all heads."""
    return {"query_norm.scale": (head,), "key_norm.scale": (head,)}


def both_streams(stream: dict[str, Shapes]) -> Shapes:
    """The halves of a block of Flux that belong to the image and to the text."""
    return nest({f"{side}_{name}": shapes for side in ("img", "txt") for name, shapes in stream.items()})


def double_block(width: int, head: int, inner: int, gates: int = 0) -> Shapes:
    """A block of Flux in which text and image have weights of their own and attend to each other, not modulated.

    Args:
        width: channels of a token.
        head: channels of an attention head.
        inner: channels inside a feed-forward layer.
        gates: how many of those are multiplied with gates.
    """
    return both_streams(
        {
            "attn.qkv": linear(3 * width, width),
            "attn.norm": query_key_norm(head),
            "attn.proj": linear(width, width),
            "mlp.0": linear(inner + gates, width),
            "mlp.2": linear(width, inner),
        }
    )


def single_block(width: int, head: int, inner: int, gates: int = 0) -> Shapes:
    """A block of Flux over both alike, attention and feed-forward side by side in two matrices; see `double_block`."""
    linear1, linear2 = linear(3 * width + inner + gates, width), linear(width, width + inner)
    return nest({"linear1": linear1, "linear2": linear2, "norm": query_key_norm(head)})
