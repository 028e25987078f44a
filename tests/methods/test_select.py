"""Methods that choose inputs or keys: nothing is computed, so results are the inputs bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.extensions import model_configs

UNET = "model.diffusion_model.input_blocks.0.0.bias"
UNET_AVERAGE = "model_ema.diffusion_modelinput_blocks00bias"
WEIGHT = "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model.decoder.conv_in.bias"


def merged(recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    result = sd_mecha.merge(recipe, merge_dtype=None, output_dtype=None, threads=0, **options)
    result.pop("__metadata__", None)
    return result


def sd1(**tensors: torch.Tensor) -> Any:
    return sd_mecha.model(tensors, config="sd1-ldm")


def test_fallback_fills_only_the_gaps() -> None:
    a = {VAE: torch.full((512,), -0.0), UNET: torch.ones(320)}
    b = {VAE: torch.ones(512), WEIGHT: torch.zeros(320, 4, 3, 3)}
    got = merged(sd1(**a) | sd1(**b))
    assert got.keys() == {VAE, UNET, WEIGHT}
    assert torch.equal(got[VAE].view(torch.int32), a[VAE].view(torch.int32))  # the sign of zero survives
    assert torch.equal(got[WEIGHT], b[WEIGHT])


def test_fallback_of_numbers() -> None:
    a, b = (sd1(**{VAE: torch.full((512,), v), UNET: torch.full((320,), v)}) for v in (0.0, 8.0))
    alpha = sd_mecha.literal({VAE: 0.25}, "sd1-ldm") | 0.5
    got = merged(sd_mecha.weighted_sum(a, b, alpha=alpha))
    assert got[VAE].unique().item() == 2.0
    assert got[UNET].unique().item() == 4.0


@pytest.mark.parametrize(("component", "kept"), [("vae", VAE), ("diffuser", WEIGHT)])
def test_pick_and_omit_split_a_model(component: str, kept: str) -> None:
    tensors = {VAE: torch.randn(512), WEIGHT: torch.randn(320, 4, 3, 3)}
    picked = merged(sd_mecha.pick_component(sd1(**tensors), component))
    rest = merged(sd_mecha.omit_component(sd1(**tensors), component))
    assert picked.keys() == {kept}
    assert picked.keys() | rest.keys() == tensors.keys()
    assert not picked.keys() & rest.keys()
    assert torch.equal(picked[kept], tensors[kept])


@pytest.mark.parametrize("method", ["pick_component", "omit_component"])
def test_an_unknown_component_is_named_with_those_there_are(method: str) -> None:
    model = sd1(**{VAE: torch.randn(512), WEIGHT: torch.randn(320, 4, 3, 3)})
    with pytest.raises((ValueError, RuntimeError), match=r"no component 'unet'.*clip_l, vae, diffuser"):
        merged(getattr(sd_mecha, method)(model, "unet"))


def test_exchange_ema_swaps_weights_and_averages() -> None:
    tensors = {UNET: torch.full((320,), 1.0), UNET_AVERAGE: torch.full((320,), 2.0), VAE: torch.randn(512)}
    got = merged(sd_mecha.exchange_ema(sd1(**tensors)))
    assert got[UNET].unique().item() == 2.0
    assert got[UNET_AVERAGE].unique().item() == 1.0
    assert VAE in got


def test_exchange_ema_leaves_out_what_has_no_counterpart_unless_told_otherwise() -> None:
    model = sd1(**{UNET: torch.ones(320), VAE: torch.randn(512)})
    assert merged(sd_mecha.exchange_ema(model)).keys() == {VAE}
    assert merged(sd_mecha.exchange_ema(model) | model).keys() == {UNET, VAE}


def test_block_weights_reach_the_keys_of_their_block() -> None:
    blocks = {f"IN{i:02}": 0.0 for i in range(12)} | {f"OUT{i:02}": 0.0 for i in range(12)}
    blocks |= {"BASE": 0.5, "M00": 0.0, "IN00": 1.0}
    tensors = {UNET: torch.zeros(320), VAE: torch.zeros(512)}
    a, b = sd1(**tensors), sd1(**{key: tensor + 1 for key, tensor in tensors.items()})
    alpha = sd_mecha.convert(sd_mecha.literal(blocks, "sd1-supermerger_blocks"), a)
    got = merged(sd_mecha.weighted_sum(a, b, alpha=alpha))
    assert got[UNET].unique().item() == 1.0
    assert got[VAE].unique().item() == 0.5


def test_every_key_of_sd1_has_a_block() -> None:
    from sd_mecha.builtin.conversions.blocks import block_of

    blocks = model_configs.resolve("sd1-supermerger_blocks").keys()
    used = {block_of(key, last_block="OUT11") for key in model_configs.resolve("sd1-ldm").keys()}  # noqa: SIM118
    assert used == set(blocks)


def test_omit_non_finite_leaves_the_fallback_in_charge() -> None:
    bad = sd_mecha.model({"x": torch.tensor([1.0, float("inf")]), "y": torch.tensor([1.0])})
    base = sd_mecha.model({"x": torch.tensor([5.0, 6.0]), "y": torch.tensor([7.0])})
    got = merged(sd_mecha.omit_non_finite(bad) | base, omit_non_finite_inputs=False)
    assert got["x"].tolist() == [5.0, 6.0]
    assert got["y"].tolist() == [1.0]


def test_stack_counts_models_in_the_first_dimension() -> None:
    tensors = [{"x": torch.full((2, 3), float(i)), "s": torch.tensor(float(i))} for i in range(3)]
    models = [sd_mecha.model(tensor) for tensor in tensors]
    got = merged(sd_mecha.stack(*models))
    assert got["x"].shape == (3, 2, 3)
    assert got["x"][:, 0, 0].tolist() == got["s"].tolist() == [0.0, 1.0, 2.0]


def test_dtype_and_device_can_be_asked_of_weights_and_deltas() -> None:
    half = sd_mecha.model({"x": torch.ones(2, dtype=torch.float16)})
    for model in (half, sd_mecha.model({"x": torch.ones(2, dtype=torch.float16)}, merge_space="delta")):
        full = sd_mecha.model({"x": torch.tensor([1.0, 1 / 3])})
        recipe = sd_mecha.cast(full, dtype=sd_mecha.get_dtype(model), device=sd_mecha.get_device(model))
        assert merged(recipe)["x"].dtype == torch.float16


def test_cast_rounds_within_a_recipe() -> None:
    model = sd_mecha.model({"x": torch.tensor([1.7, -1.7, 1 / 3])})
    assert merged(model.to(dtype=torch.int8))["x"].tolist() == [1, -1, 0]
    assert merged(model.to(dtype="float16"))["x"].dtype == torch.float16
    back = merged(model.to(dtype="bfloat16").to(dtype="float32"))["x"]
    assert torch.equal(back, torch.tensor([1.7, -1.7, 1 / 3]).bfloat16().float())
