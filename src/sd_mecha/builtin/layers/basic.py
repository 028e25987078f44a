"""Keys and shapes of the layers that all models are made of.

Each function returns key -> shape below the layer; `nest` puts layers under names.
"""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def nest(layers: Mapping[str, Shapes | Shape]) -> Shapes:
    """Prefix the keys of each layer with its name; a shape is a tensor of that name.

    >>> nest({"table": (2, 8), "norm": norm(8)})
    {'table': (2, 8), 'norm.weight': (8,), 'norm.bias': (8,)}
    """
    out: Shapes = {}
    for name, layer in layers.items():
        if isinstance(layer, tuple):
            out[name] = layer
        else:
            out |= {f"{name}.{key}": shape for key, shape in layer.items()}
    return out


def conv(outputs: int, inputs: int, *kernel: int) -> Shapes:
    """A convolution, of images with a kernel of 3x3 where none is given."""
    return {"weight": (outputs, inputs, *(kernel or (3, 3))), "bias": (outputs,)}


def linear(outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {"weight": (outputs, inputs)} | ({"bias": (outputs,)} if bias else {})


def norm(channels: int) -> Shapes:
    return {"weight": (channels,), "bias": (channels,)}


def scale(channels: int) -> Shapes:
    """A normalisation that has scales only."""
    return {"weight": (channels,)}


def unbiased(shapes: Shapes) -> Shapes:
    """The same layers without biases."""
    return {key: shape for key, shape in shapes.items() if key.rpartition(".")[2] != "bias"}
