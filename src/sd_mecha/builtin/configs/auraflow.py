"""AuraFlow: blocks in which text and image have weights of their own, then blocks over both alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sd_mecha.builtin.conversions import auraflow as rules
from sd_mecha.builtin.layers import transformer_family
from sd_mecha.builtin.layers.basic import Shapes, linear, nest, unbiased
from sd_mecha.builtin.layers.components import Keys, component
from sd_mecha.builtin.layers.images import vae
from sd_mecha.builtin.layers.transformers import FREQUENCIES, modulation, two_layers
from sd_mecha.extensions.hyperparameters import count, size

_PROJECTION, _OTHER = "single_layers.*.mlp.c_proj.weight", "double_layers.*.mlpX.c_proj.weight"


@dataclass(frozen=True)
class AuraFlow:
    """Sizes of an AuraFlow.

    Attributes:
        positions: number of tokens that have position embeddings.
        registers: tokens that are learned.
    """

    width: int = size(_PROJECTION, 0, _OTHER)
    inner: int = size(_PROJECTION, 1, _OTHER)
    double: int = count("double_layers")
    single: int = count("single_layers")
    channels: int = size("init_x_linear.weight", 1, ("final_linear.weight", 0))
    context: int = size("cond_seq_linear.weight", 1)
    positions: int = size("positional_encoding", 1)
    registers: int = size("register_tokens", 1)


def build(h: AuraFlow) -> Shapes:
    """Return the keys in the original layout."""
    width, modulated = h.width, modulation(h.width, h.width, 6)
    gates = dict.fromkeys(("c_fc1", "c_fc2"), linear(h.inner, width))
    feed_forward = nest({**gates, "c_proj": linear(width, h.inner)})
    first, second = (nest({f"w{side}{part}": linear(width, width) for part in "qkvo"}) for side in (1, 2))
    double = nest(
        {"mlpC": feed_forward, "modC.1": modulated, "mlpX": feed_forward, "modX.1": modulated, "attn": first | second}
    )
    single = nest({"modCX.1": modulated, "attn": first, "mlp": feed_forward})
    embedders = nest(
        {
            "positional_encoding": (1, h.positions, width),
            "register_tokens": (1, h.registers, width),
            "t_embedder": two_layers("mlp.0", "mlp.2", width, FREQUENCIES),
            "init_x_linear": linear(width, h.channels),
        }
    )
    layers = nest(
        {
            "cond_seq_linear": linear(width, h.context),
            **{f"double_layers.{i}": double for i in range(h.double)},
            **{f"single_layers.{i}": single for i in range(h.single)},
            "final_linear": linear(h.channels, width),
            "modF.1": modulation(width, width, 2),
        }
    )
    return embedders | unbiased(layers)


def others(h: AuraFlow) -> dict[str, Keys]:
    """Return the autoencoder, which is that of Stable Diffusion XL."""
    return {"vae": component("vae.", vae(latent=4), torch.float16, optional=("",))}


transformer_family.register(
    "auraflow",
    {"auraflow_v0.3": AuraFlow(3072, 8192, 4, 32, 16, 2048, 9216, 8)},
    build=build,
    signs=("double_layers.*.attn.w2q.weight", "double_layers.*.attn.w2k.weight", "double_layers.*.mlpC.c_fc1.weight"),
    rules=lambda h: rules.auraflow(),
    prefix="model.",
    dtype=torch.float16,
    others=others,
)
