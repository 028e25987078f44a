"""Layers of Stable Diffusion written out, to see whether they still compute the same with other weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from sd_mecha.extensions import model_configs

State = Mapping[str, Tensor]


def attention(x: Tensor, context: Tensor, state: State, names: tuple[str, str, str, str], heads: int) -> Tensor:
    """Attention by the layers of these names: queries, keys, values, result."""
    queries, keys, values = (
        functional.linear(inputs, state[f"{name}.weight"], state.get(f"{name}.bias")).unflatten(-1, (heads, -1))
        for name, inputs in zip(names, (x, context, context), strict=False)
    )
    scores = torch.einsum("ihc,jhc->hij", queries, keys) / queries.shape[-1] ** 0.5
    mixed = torch.einsum("hij,jhc->ihc", scores.softmax(-1), values).flatten(-2)
    return functional.linear(mixed, state[f"{names[3]}.weight"])


def stacked_attention(x: Tensor, state: State, prefix: str, heads: int) -> Tensor:
    """The attention of torch, with queries, keys and values in one tensor."""
    layer = torch.nn.MultiheadAttention(x.shape[-1], heads, dtype=x.dtype)
    layer.load_state_dict({key: state[prefix + key] for key in layer.state_dict()})
    return layer(x, x, x, need_weights=False)[0].detach()  # type: ignore[no-any-return]


def feed_forward(x: Tensor, state: State, first: str, second: str, *, gated: bool = False) -> Tensor:
    hidden = functional.linear(x, state[f"{first}.weight"], state[f"{first}.bias"])
    if gated:
        values, gates = hidden.chunk(2, -1)
        hidden = values * functional.gelu(gates)
    else:
        hidden = functional.gelu(hidden)
    return functional.linear(hidden, state[f"{second}.weight"])


TEXT = "q_proj", "k_proj", "v_proj", "out_proj"
IMAGE = "to_q", "to_k", "to_v", "to_out.0"

_TEXT = "text_model.encoder.layers.3."
_SD1, _SDXL = (f"model.diffusion_model.input_blocks.{block}.1.transformer_blocks.0." for block in (1, 4))
PARTS = {
    "sd1 self-attention": ("sd1-ldm", f"{_SD1}attn1."),
    "sd1 cross-attention": ("sd1-ldm", f"{_SD1}attn2."),
    "sd1 text attention": ("sd1-ldm", f"cond_stage_model.transformer.{_TEXT}self_attn."),
    "sd1 gates": ("sd1-ldm", f"{_SD1}ff."),
    "sdxl text attention": ("sdxl-sgm", f"conditioner.embedders.0.transformer.{_TEXT}self_attn."),
    "sdxl text layers": ("sdxl-sgm", f"conditioner.embedders.0.transformer.{_TEXT}mlp."),
    "sdxl stacked attention": ("sdxl-sgm", "conditioner.embedders.1.model.transformer.resblocks.0.attn."),
    "sdxl gates": ("sdxl-sgm", f"{_SDXL}ff."),
    "sdxl image attention": ("sdxl-sgm", f"{_SDXL}attn2."),
    "sdxl time": ("sdxl-sgm", "model.diffusion_model.time_embed."),
}
"""By name: the config, and with what the keys of the layers begin."""


def random_state(part: str, seed: int) -> dict[str, Tensor]:
    """Weights for a part, on the scale of a trained model."""
    config, prefix = PARTS[part]
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(metadata.shape, dtype=torch.float64, generator=generator) / metadata.shape[-1] ** 0.5
        for key, metadata in model_configs.resolve(config).keys().items()
        if key.startswith(prefix)
    }


def compute(part: str, state: State) -> Tensor:
    """What the layers of a part make of fixed inputs."""
    _, prefix = PARTS[part]
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    generator = torch.Generator().manual_seed(8)

    def inputs(count: int, layer: str) -> Tensor:
        return torch.randn(count, state[f"{layer}.weight"].shape[1], dtype=torch.float64, generator=generator)

    if "to_q.weight" in state:
        return attention(inputs(5, "to_q"), inputs(7, "to_k"), state, IMAGE, heads=8 if part.startswith("sd1") else 10)
    if "q_proj.weight" in state:
        x = inputs(5, "q_proj")
        return attention(x, x, state, TEXT, heads=12)
    if "in_proj_weight" in state:
        width = state["in_proj_weight"].shape[1]
        x = torch.randn(5, width, dtype=torch.float64, generator=generator)
        return stacked_attention(x, state, "", heads=20)
    if "net.2.weight" in state:
        return feed_forward(inputs(5, "net.0.proj"), state, "net.0.proj", "net.2", gated=True)
    first, second = ("fc1", "fc2") if "fc1.weight" in state else ("0", "2")
    return feed_forward(inputs(5, first), state, first, second)
