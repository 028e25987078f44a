"""What becomes of each kind of tensor: integers are exact, facts copied, fp8 computed in float32, NaN left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
HUGE = (1 << 24) + 1, (1 << 53) + 1, -(1 << 62) - 1
MARKERS = ("v_pred", "ztsnr", "model.v_pred", "edm_vpred.sigma_max")


def tensors(merged: Any) -> dict[str, torch.Tensor]:
    return {key: value for key, value in merged.items() if isinstance(value, torch.Tensor)}


def average(*models: Any, **options: Any) -> dict[str, torch.Tensor]:
    return tensors(sd_mecha.merge(sd_mecha.n_average(*map(sd_mecha.model, models)), **options))


def in_memory_and_in_a_file(tmp_path: Path, **values: torch.Tensor) -> list[Any]:
    save_file(values, tmp_path / "model.safetensors")
    return [values, tmp_path / "model.safetensors"]


# --- integers, bools and markers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"output_dtype": None}, {"merge_dtype": None}, {"output_dtype": "int64"}])
def test_integers_are_copied_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    for model in in_memory_and_in_a_file(tmp_path, x=torch.tensor(HUGE)):
        for recipe in (sd_mecha.model(model), sd_mecha.weighted_sum(sd_mecha.model(model), sd_mecha.model(model))):
            merged = sd_mecha.merge(recipe, **options)
            assert merged["x"].dtype == torch.int64
            assert merged["x"].tolist() == list(HUGE)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("options", [{}, {"merge_dtype": None, "output_dtype": None}])
def test_every_kind_of_integer_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    value = torch.tensor([0, 1, 100]).to(dtype)
    for model in in_memory_and_in_a_file(tmp_path, x=value):
        merged = average(model, model, **options)["x"]
        assert merged.dtype == dtype
        assert torch.equal(merged, value)


def test_integers_that_differ_are_those_of_the_first_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    one, other = ({"position_ids": torch.arange(4) + shift, "w": torch.ones(1)} for shift in (0, 7))
    assert average(one, one)["position_ids"].tolist() == [0, 1, 2, 3]
    assert not caplog.records
    merged = average(one, other)
    assert merged["position_ids"].tolist() == [0, 1, 2, 3]
    assert "'position_ids'" in caplog.text
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("key", MARKERS)
def test_markers_are_facts_and_not_weights(key: str, caplog: pytest.LogCaptureFixture) -> None:
    one, other = (
        {key: torch.tensor(value), "w": torch.tensor([value]), **{f"w{i}": torch.ones(1) for i in range(10)}}
        for value in (1.0, 3.0)
    )
    merged = average(one, other)
    assert merged["w"].tolist() == [2.0]
    assert merged[key].tolist() == 1.0
    assert merged[key].dtype == torch.float32
    assert repr(key) in caplog.text
    empty = {**one, key: torch.empty(0)}
    assert average(empty, empty)[key].shape == (0,)


@pytest.mark.parametrize("key", MARKERS)
@pytest.mark.parametrize("config", [None, "sd1-ldm"])
def test_a_marker_that_one_model_has_is_copied(key: str, config: str | None, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"model.diffusion_model.{layer}.weight" for layer in ("time_embed.0", "time_embed.2")]
    plain: dict[str, torch.Tensor] = {name: torch.zeros(1) for name in names}
    marked = {**plain, key: torch.tensor(7.0)}
    nodes = [sd_mecha.model(m, config=config or "structural") for m in (plain, marked)]
    merged = sd_mecha.merge(sd_mecha.weighted_sum(*nodes), output_dtype=None)
    assert merged[key].tolist() == 7.0
    assert set(merged) - {"__metadata__"} == set(marked)
    assert not caplog.records


def test_a_marker_goes_with_its_component() -> None:
    model = {
        "model.diffusion_model.time_embed.0.weight": torch.zeros(1),
        "first_stage_model.quant_conv.bias": torch.zeros(1),
        "v_pred": torch.zeros(0),
    }
    vae = sd_mecha.pick_component(sd_mecha.model(model, config="sdxl-sgm"), "vae")
    assert set(sd_mecha.merge(vae)) - {"__metadata__"} == {"first_stage_model.quant_conv.bias"}


def test_integers_go_through_arithmetic_where_the_caller_says_so() -> None:
    one, other = {"x": torch.tensor([2, 4])}, {"x": torch.tensor([4, 10])}
    a, b = map(sd_mecha.model, (one, other))
    half = sd_mecha.weighted_sum(a.to(dtype="float32"), b.to(dtype="float32"))
    assert sd_mecha.merge(half, output_dtype=None)["x"].tolist() == [3.0, 7.0]


def test_integers_and_floats_mix_as_numbers() -> None:
    merged = average({"x": torch.tensor([1, 2])}, {"x": torch.tensor([2.0, 2.5])})
    assert merged["x"].tolist() == [1.5, 2.25]


# --- floats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *FLOAT8])
def test_without_dtypes_what_is_stored_is_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    one, other = torch.tensor([1.0, 2.0, -3.0]).to(dtype), torch.tensor([2.0, 2.0, -1.0]).to(dtype)
    for a, b in zip(in_memory_and_in_a_file(tmp_path, x=one), [{"x": other}, {"x": other}], strict=True):
        merged = average(a, b, merge_dtype=None, output_dtype=None)["x"]
        assert merged.dtype == dtype
        assert merged.float().tolist() == [1.5, 2.0, -2.0]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_fp8_is_computed_in_float32(dtype: torch.dtype) -> None:
    grid = torch.linspace(-3, 3, 64).to(dtype)
    one, other = {"x": grid}, {"x": grid.float().flip(0).to(dtype)}
    recipe = sd_mecha.weighted_sum(sd_mecha.model(one), sd_mecha.model(other), alpha=0.3)
    merged = sd_mecha.merge(recipe, merge_dtype=None, output_dtype=None)["x"]
    expected = torch.lerp(one["x"].float(), other["x"].float(), 0.3).to(dtype)
    assert torch.equal(merged.view(torch.uint8), expected.view(torch.uint8))
    assert sd_mecha.merge(recipe, output_dtype=None)["x"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [*FLOATS, *FLOAT8, torch.int8, torch.bool])
def test_any_output_dtype_can_be_written(tmp_path: Path, dtype: torch.dtype) -> None:
    one = {"x": torch.tensor([0.0, 1.0, 2.0])}
    path = tmp_path / "o.safetensors"
    sd_mecha.merge(sd_mecha.model(one), output=path, output_dtype=dtype)
    assert load_file(path)["x"].dtype == dtype
    assert load_file(path)["x"].float().tolist() == one["x"].to(dtype).float().tolist()


def test_dtypes_may_differ_between_models() -> None:
    models = [{"x": torch.tensor([value]).to(dtype)} for value, dtype in zip((1.0, 2.0, 6.0, 3.0), FLOATS, strict=True)]
    assert average(*models, output_dtype=None)["x"].tolist() == [3.0]
    mixed = average(*models, merge_dtype=None, output_dtype=None)["x"]
    assert mixed.dtype == torch.float64
    assert mixed.tolist() == [3.0]


@pytest.mark.parametrize("options", [{}, {"output_dtype": None}])
def test_complex_numbers_keep_their_imaginary_part(tmp_path: Path, options: dict[str, Any]) -> None:
    one, other = torch.tensor([1 + 2j]), torch.tensor([3 - 4j])
    assert average({"x": one}, {"x": other}, **options)["x"].tolist() == [2 - 1j]
    path = tmp_path / "c.safetensors"
    sd_mecha.merge(sd_mecha.model({"x": one}), output=path, **options)
    assert load_file(path)["x"].tolist() == [1 + 2j]


# --- inf and nan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("threads", [0, 3])
def test_a_tensor_with_nan_is_left_out_and_told(
    tmp_path: Path, bad: float, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"w": torch.ones(4), "v": torch.ones(4)}
    save_file({**good, "w": torch.tensor([1.0, bad, 1.0, 1.0])}, tmp_path / "bad.safetensors")
    merged = average(good, tmp_path / "bad.safetensors", threads=threads)
    assert merged.keys() == {"v"}
    for part in ("'w'", "bad.safetensors", "inf or nan", "left out"):
        assert part in caplog.text
    recipe = sd_mecha.n_average(sd_mecha.model(good), sd_mecha.model(tmp_path / "bad.safetensors"))
    sd_mecha.merge(recipe, output=tmp_path / "o.safetensors", threads=threads)
    assert load_file(tmp_path / "o.safetensors").keys() == {"v"}


def test_nan_goes_through_where_the_caller_says_so(caplog: pytest.LogCaptureFixture) -> None:
    bad = {"w": torch.tensor([1.0, torch.nan])}
    merged = average(bad, {"w": torch.ones(2)}, omit_non_finite_inputs=False)
    assert merged["w"].isnan().tolist() == [False, True]
    assert "'w'" in caplog.text
    caplog.clear()
    average(bad, bad, omit_non_finite_inputs=False, check_finite_output=False)
    assert not caplog.records


def test_a_result_too_large_for_the_output_is_told(caplog: pytest.LogCaptureFixture) -> None:
    merged = average({"w": torch.tensor([1e9]), "v": torch.ones(1)})
    assert merged["w"].isinf().all()
    assert "'w'" in caplog.text
    assert "'v'" not in caplog.text


# --- shapes and strides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["weighted_sum", "slerp", "n_average"])
def test_empty_tensors_and_scalars(tmp_path: Path, method: str) -> None:
    value = {"none": torch.empty(0, 3), "scalar": torch.tensor(2.0), "flat": torch.empty(0)}
    call = getattr(sd_mecha, method)
    for model in in_memory_and_in_a_file(tmp_path, **value):
        recipe = call(sd_mecha.model(model), sd_mecha.model(model))
        sd_mecha.merge(recipe, output=tmp_path / "o.safetensors")
        for merged in (tensors(sd_mecha.merge(recipe)), load_file(tmp_path / "o.safetensors")):
            assert {k: tuple(t.shape) for k, t in merged.items()} == {"none": (0, 3), "scalar": (), "flat": (0,)}
            assert merged["scalar"].item() == 2.0


def test_any_strides(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"t": base.T, "step": base[:, ::2], "row": base[1], "wide": base[:1].expand(5, 6), "flip": base.flip(0)}
    for recipe in (sd_mecha.model(views), sd_mecha.weighted_sum(sd_mecha.model(views), sd_mecha.model(dict(views)))):
        sd_mecha.merge(recipe, output=tmp_path / "o.safetensors", output_dtype=None)
        for merged in (tensors(sd_mecha.merge(recipe, output_dtype=None)), load_file(tmp_path / "o.safetensors")):
            assert merged.keys() == views.keys()
            for key, tensor in merged.items():
                assert torch.equal(tensor, views[key])


def test_tied_tensors_are_two_tensors(tmp_path: Path) -> None:
    shared = torch.ones(4)
    tied = {"encoder": shared, "decoder": shared, "part": shared[1:]}
    sd_mecha.merge(sd_mecha.n_average(sd_mecha.model(tied)), output=tmp_path / "o.safetensors")
    assert {k: t.tolist() for k, t in load_file(tmp_path / "o.safetensors").items()} == {
        "encoder": [1.0] * 4,
        "decoder": [1.0] * 4,
        "part": [1.0] * 3,
    }
