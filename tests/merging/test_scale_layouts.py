"""Eight bits and fewer with scales in the layouts of other programs: read where they can be meant in one way only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sd_mecha
from sd_mecha.errors import FileFormatError, MechaError, OptionError
from sd_mecha.storage.dtypes import FLOAT4

FP8 = torch.float8_e4m3fn


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(FP8)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5


def merged(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    found = dict(sd_mecha.merge(sd_mecha.model(model), output_dtype=None, tqdm=None) or {})
    found.pop("__metadata__", None)
    return found


@pytest.mark.parametrize("name", ["scale", "qscale_weight"])
@pytest.mark.parametrize(
    ("scale", "spread"),
    [
        (scales(1, 1), lambda s: s),
        (scales(300), lambda s: s[:, None]),
        (scales(3, 2), lambda s: s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :130]),
    ],
    ids=["one", "rows", "blocks"],
)
def test_other_names_of_scales(name: str, scale: torch.Tensor, spread: Any) -> None:
    matrices = ["l.0.v.weight", "l.0.w.weight"]
    model = {"embed.weight": values(300, 130), "head.bias": scales(1)}
    for key in matrices:
        module = key.removesuffix("weight")
        model |= {key: values(300, 130), f"{module}{name}": scale, f"{module}activation_scale": torch.tensor(2.0)}
    found = merged(model)
    assert set(found) == {"embed.weight", "head.bias", *matrices}
    assert torch.equal(found["embed.weight"].float(), model["embed.weight"].float())
    for key in matrices:
        assert torch.equal(found[key], model[key].float() * spread(scale))


@pytest.mark.parametrize(
    ("ending", "shape", "spread"),
    [
        ("scale_inv", (2, 1, 1), lambda s: s),
        ("scale_inv", (2, 2, 3), lambda s: s.repeat_interleave(128, 1).repeat_interleave(128, 2)),
        ("scale_inv", (2, 256, 12), lambda s: s.repeat_interleave(32, 2)),
        ("scale", (2, 1, 1), lambda s: s),
        ("scale", (2, 1, 384), lambda s: s),
        ("scale", (2, 384, 1), lambda s: s.transpose(1, 2)),
    ],
    ids=str,
)
def test_experts_in_one_tensor(ending: str, shape: tuple[int, ...], spread: Any) -> None:
    scale = scales(*shape)
    model = {
        "experts.gate_up_proj": values(2, 256, 384),
        f"experts.gate_up_proj_{ending}": scale,
        "experts.gate_up_proj_activation_scale": torch.ones(2),
    }
    found = merged(model)
    assert list(found) == ["experts.gate_up_proj"]
    assert torch.equal(found["experts.gate_up_proj"], model["experts.gate_up_proj"].float() * spread(scale))


@pytest.mark.parametrize(
    ("key", "matrix", "other", "scale"),
    [
        ("e.up_proj", values(2, 4, 4), "e.up_proj_scale", scales(2, 4, 1)),  # of rows or of columns?
        ("e.up_proj", values(2, 8, 4), "e.up_proj_scale", scales(2, 8, 1)),
        ("e.up_proj", values(2, 960, 4), "e.up_proj_scale_inv", scales(2, 8, 1)),  # blocks of 120 or of 128?
        ("e.up_proj", values(2, 8, 4), "e.up_proj_scale_inv", torch.ones(2, 8, 1).byte()),
        ("e.up_proj", values(2, 8, 4), "e.up_proj_weight_scale", scales(2)),
        ("e.up_proj", values(2, 8, 4), "e.up_proj_scales", scales(2)),
        ("l.weight", values(8, 4), "l.weight_scales", scales(8)),
        ("l.weight", values(8, 4), "l.weight_block_scale", scales(8)),
        ("e.w13_weight", values(2, 8, 4), "e.w13_scale", scales(2, 1, 1)),
        ("a.in_proj_weight", values(8, 4), "a.in_proj_scale", scales(8)),
        ("l.weight", values(8, 4), "l.scale", torch.ones(8, 1).byte()),
        ("l.weight", values(8, 4), "l.scales", scales(8)),
        ("weight", values(8, 4), "scale_inv", scales(8)),
        ("l.weight", torch.ones(8, 4).char(), "l.scale", scales(8, 1)),
        ("l.weight", torch.ones(8, 4).char(), "l.weight_scale_inv", scales(8, 1)),
        ("e.up_proj", torch.ones(2, 8, 4).char(), "e.up_proj_scale_inv", scales(2, 8, 1)),
    ],
)
def test_what_is_not_understood_is_refused(key: str, matrix: torch.Tensor, other: str, scale: torch.Tensor) -> None:
    with pytest.raises(FileFormatError) as caught:
        merged({key: matrix, other: scale})
    assert repr(key) in str(caught.value)
    assert repr(other) in str(caught.value)


def test_a_scale_of_all_matrices_has_to_fit() -> None:
    with pytest.raises(FileFormatError, match=r"'b\.scale' of shape \(3,\).*does not fit the fp8 matrix 'b\.weight'"):
        merged({"a.weight": values(8, 4), "a.scale": scales(8), "b.weight": values(8, 4), "b.scale": scales(3)})


def test_a_scale_of_some_matrices_is_refused() -> None:
    model = {f"{name}.weight": values(8, 4) for name in "abc"} | {f"{name}.scale": scales(8) for name in "ab"}
    with pytest.raises(FileFormatError, match=r"'a\.scale' may be .* or a parameter of its own: .*'c\.weight'"):
        merged(model)


@pytest.mark.parametrize(
    ("key", "matrix", "other", "parameter"),
    [
        ("l.weight", values(8, 4), "l.upscale_weight", scales(8, 4)),
        ("l.weight", values(8, 4), "l.weight_scale_table", scales(8, 4)),
        ("l.weight", values(8, 4), "l.weight_scale_table", scales(8, 5)),
        ("l.weight", values(8, 4), "l.multiscale_weights", scales(4)),
        ("l.weight", values(8, 4), "l.weight_rescale", scales()),
        ("l.weight", values(8, 4), "l.scale", scales(1)),
        ("l.weight", values(8, 4), "l.scale", scales(8)),
        ("conv.weight", values(8, 4, 3, 3), "conv.scale", scales(8)),
        ("conv.weight", values(8, 4, 3, 3), "conv.scale", scales(8, 1, 1, 1)),
        ("pos_embed", values(1, 8, 8), "pos_embed_scale", scales(1)),
        ("pos_embed", values(8, 8), "pos_embed_scale", scales(1)),
        ("b.modulation", values(1, 6, 8), "b.modulation.scale", scales(1)),
        ("mask", torch.ones(8, 8).char(), "mask_scale", scales(8)),
    ],
)
def test_a_parameter_is_no_scale(key: str, matrix: torch.Tensor, other: str, parameter: torch.Tensor) -> None:
    found = merged({key: matrix, other: parameter})
    assert set(found) == {key, other}
    assert torch.equal(found[key].float(), matrix.float())
    assert torch.equal(found[other], parameter)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.bfloat16])
def test_parameters_that_are_called_scale(dtype: torch.dtype) -> None:
    """Of models that were cast as a whole, and of those of which only the matrices were."""
    model = {
        "logit_scale": torch.tensor(2.0),
        "l.0.lin.weight": values(8, 4).to(dtype),
        "l.0.lin.input_scale": torch.tensor(2.0),
        "l.0.norm.weight": values(4).to(dtype),
        "l.0.norm.scale": torch.full((4,), 2.0),
        "l.0.scale": torch.full((4,), 2.0),
        "l.0.layer_scale.weight": torch.full((4,), 2.0),
        "l.0.scale_shift_table": torch.full((6, 4), 2.0),
        "l.0.k_scale": torch.tensor(2.0),
        "whole.weight": values(8, 4).to(dtype),
        "whole.scale": values(8).to(dtype),
    }
    found = merged(model)
    assert set(found) == set(model)
    for key, tensor in model.items():
        assert torch.equal(found[key].float(), tensor.float()), key


@pytest.mark.parametrize("output_format", ["huggingface", "diffusers"])
def test_folders_take_no_scales(tmp_path: Path, output_format: str) -> None:
    save_file({"blocks.0.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    recipe = sd_mecha.model(tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match=r"scaled_fp8.*does not read.*ends in \.safetensors"):
        sd_mecha.merge(recipe, output=tmp_path / "out", output_format=output_format, scaled_fp8=True, tqdm=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(FLOAT4 is None, reason="torch has no 4-bit floats")
class TestFourBitFloats:
    def test_an_input_is_refused(self) -> None:
        assert FLOAT4 is not None
        model = {"w": torch.zeros(2, 4).byte().view(FLOAT4), "b": torch.ones(1)}
        with pytest.raises(FileFormatError, match=r"'w' is float4_e2m1fn_x2 \(F4\).*save it as floats"):
            merged(model)
        recipe = sd_mecha.model({"w": torch.ones(2, 4)}) + sd_mecha.literal({"w": model["w"]})
        with pytest.raises(MechaError, match="'w': it is float4_e2m1fn_x2; give it as floats"):
            sd_mecha.merge(recipe, tqdm=None)

    @pytest.mark.parametrize("option", ["output_dtype", "merge_dtype"])
    @pytest.mark.parametrize("dtype", ["F4", FLOAT4])
    def test_nothing_is_converted_to_them(self, option: str, dtype: Any) -> None:
        options: dict[str, Any] = {option: dtype, "tqdm": None}
        with pytest.raises(OptionError, match=r"torch converts nothing to float4_e2m1fn_x2 \(F4\)"):
            sd_mecha.merge(sd_mecha.model({"w": torch.ones(2, 4)}), **options)
