"""A LoRA or LoKr that is extracted from a delta gives back the part of the delta that one can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import ParameterError
from sd_mecha.extensions import merge_methods

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"
KERNEL = "unet.conv_in.weight"
POINT = "unet.down_blocks.0.attentions.0.proj_in.weight"
NORM = "unet.down_blocks.0.attentions.0.norm.weight"
SHAPES = {LINEAR: (24, 16), KERNEL: (12, 4, 3, 3), POINT: (8, 6, 1, 1), NORM: (8,)}
KINDS = {"kohya": "lora", "lycoris": "lycoris"}


def delta(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in SHAPES.items()}


def merged(recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    fixed = {"merge_dtype": torch.float64, "output_dtype": None, "strict_merge_space": None, "threads": 0}
    result = sd_mecha.merge(recipe, **{**fixed, **options})
    return {key: value for key, value in result.items() if key != "__metadata__"}


def extracted(kind: str, family: str, tensors: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    method = merge_methods.resolve(f"extract_{kind}_{family}")
    return merged(method(sd_mecha.model(tensors, "sd1-kohya", "delta"), **options))


def returned(kind: str, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return merged(sd_mecha.convert(sd_mecha.model(factors, f"sd1-kohya_{kind}_lora"), "sd1-kohya"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("approximate", [True, False])
def test_lora(kind: str, approximate: bool) -> None:
    options = {"rank": 3, "use_approximate_basis": approximate, "approximate_basis_iters": 20}
    tensors = delta()
    factors = extracted(kind, "lora", tensors, **options)
    module = f"{KINDS[kind]}_unet_conv_in"
    assert factors[f"{module}.lora_up.weight"].shape == (12, 3, 1, 1)
    assert factors[f"{module}.lora_down.weight"].shape == (3, 4, 3, 3)
    assert factors[f"{module}.alpha"].item() == 3
    result = returned(kind, factors)
    assert result.keys() == tensors.keys() - {NORM}
    for key, tensor in result.items():
        u, s, vh = torch.linalg.svd(tensors[key].flatten(1), full_matrices=False)
        torch.testing.assert_close(tensor.flatten(1), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-5, atol=1e-5)
    for key in result:  # up and down share the singular values
        name = KINDS[kind] + "_" + key.removesuffix(".weight").replace(".", "_")
        up, down = factors[f"{name}.lora_up.weight"], factors[f"{name}.lora_down.weight"]
        assert up.norm().item() == pytest.approx(down.norm().item())


def test_a_rank_that_a_small_tensor_does_not_have() -> None:
    factors = extracted("kohya", "lora", delta(), rank=10)
    assert factors["lora_unet_conv_in.alpha"].item() == 10
    assert factors["lora_unet_down_blocks_0_attentions_0_proj_in.alpha"].item() == 6
    torch.testing.assert_close(returned("kohya", factors)[POINT], delta()[POINT])


@pytest.mark.parametrize("kind", KINDS)
def test_lokr_of_a_kronecker_product_is_exact(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    w1 = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    w2 = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    product = torch.kron(w1, w2)
    factors = extracted(kind, "lokr", {LINEAR: product}, kronecker_ratio=0.45)
    assert sorted(tuple(v.shape) for v in factors.values()) == [(), (4, 4), (6, 4)]
    torch.testing.assert_close(returned(kind, factors)[LINEAR], product)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_lokr_is_the_truncation_of_that_ratio(ratio: float) -> None:
    tensors = {key: value for key, value in delta(2).items() if key != NORM}
    result = returned("kohya", extracted("kohya", "lokr", tensors, kronecker_ratio=ratio))
    truncate = merge_methods.resolve("truncate_kronecker")
    expected = merged(truncate(sd_mecha.model(tensors, "sd1-kohya", "delta"), kronecker_ratio=ratio))
    assert result.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(result[key], tensor, rtol=1e-6, atol=1e-6)


def test_a_lora_of_a_difference_of_models_reaches_them_again() -> None:
    """The whole way: two checkpoints, their delta, a LoRA of it, and that added to the first."""
    generator = torch.Generator().manual_seed(3)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    change = torch.randn(20, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    first = {key: torch.randn(20, 20, generator=generator)}
    a, b = (sd_mecha.model(tensors, "sd1-ldm") for tensors in (first, {key: first[key] + change}))
    lora = merge_methods.resolve("extract_kohya_lora")(sd_mecha.convert(b - a, "sd1-kohya"), rank=2)
    again = merged(a + sd_mecha.convert(lora, "sd1-ldm"), merge_dtype=torch.float32)
    torch.testing.assert_close(again[key], first[key] + change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("lora", {"rank": 0}, "rank is 0"),
        ("lora", {"approximate_basis_iters": -1}, "approximate_basis_iters is -1"),
        ("lokr", {"kronecker_ratio": 1.5}, "kronecker_ratio is 1.5"),
    ],
)
def test_bad_parameters(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        extracted("kohya", family, delta(), **options)
