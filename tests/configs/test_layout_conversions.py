"""What conversions between layouts do to tensors, there and back again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.extensions import model_configs

PAIRS = [
    ("sd1-ldm", "sd1-kohya"),
    ("sdxl-sgm", "sdxl-kohya"),
    ("sdxl-sgm", "sdxl-kohya_but_diffusers"),
    ("sdxl-sgm", "sdxl-diffusers_unet_only"),
]


def small(identifier: str) -> dict[str, torch.Tensor]:
    """Every key of a config with a tensor of its own of the right number of dimensions, and of three to six rows."""
    generator = torch.Generator().manual_seed(0)
    sizes = (6, 3, 1, 1)
    tensors = {}
    for key, metadata in model_configs.resolve(identifier).keys().items():
        dims = len(metadata.shape or ())
        square = key.endswith("text_projection")
        tensors[key] = torch.randn((3, 3) if square else sizes[:dims], generator=generator)
    return tensors


def converted(tensors: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    recipe = sd_mecha.convert(sd_mecha.model(tensors, source), target)
    result: dict[str, Any] = sd_mecha.merge(recipe, merge_dtype=None, output_dtype=None, threads=0)
    return {key: value for key, value in result.items() if key != "__metadata__"}


@pytest.mark.parametrize(("original", "other"), PAIRS)
def test_there_and_back_again(original: str, other: str) -> None:
    tensors = small(original)
    there = converted(tensors, original, other)
    target = model_configs.resolve(other).keys()
    missing = target.keys() - there.keys()
    assert {key for key in missing if not key.endswith("position_ids")} == set()
    for key, tensor in there.items():
        assert tensor.dim() == len(target[key].shape or ()), key
    back = converted(there, other, original)
    assert back  # what has no place in the other layout is missing, all else is the same bit for bit
    for key, tensor in back.items():
        assert tensor.shape == tensors[key].shape, key
        assert torch.equal(tensor, tensors[key]), key
    mandatory = {key for key, m in model_configs.resolve(original).keys().items() if not m.optional}
    if other != "sdxl-diffusers_unet_only":
        assert mandatory <= back.keys()


def test_fused_attention_is_taken_apart_in_order() -> None:
    key = "conditioner.embedders.1.model.transformer.resblocks.4.attn.in_proj_{}"
    tensors = {key.format("weight"): torch.arange(12.0).reshape(6, 2), key.format("bias"): torch.arange(6.0)}
    apart = converted(tensors, "sdxl-sgm", "sdxl-kohya")
    prefix = "te2.text_model.encoder.layers.4.self_attn."
    assert {name.removeprefix(prefix): value.tolist() for name, value in apart.items()} == {
        "q_proj.weight": [[0, 1], [2, 3]],
        "k_proj.weight": [[4, 5], [6, 7]],
        "v_proj.weight": [[8, 9], [10, 11]],
        "q_proj.bias": [0, 1],
        "k_proj.bias": [2, 3],
        "v_proj.bias": [4, 5],
    }


def test_the_projection_is_transposed() -> None:
    key = "conditioner.embedders.1.model.text_projection"
    other = converted({key: torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, "sdxl-sgm", "sdxl-kohya")
    assert other["te2.text_projection.weight"].tolist() == [[1, 3], [2, 4]]


def test_the_attention_of_the_autoencoder_changes_its_dimensions() -> None:
    key = "first_stage_model.encoder.mid.attn_1.q.weight"
    other = converted({key: torch.ones(4, 4, 1, 1)}, "sd1-ldm", "sd1-kohya")
    assert {name: tuple(v.shape) for name, v in other.items()} == {
        "vae.encoder.mid_block.attentions.0.to_q.weight": (4, 4)
    }
