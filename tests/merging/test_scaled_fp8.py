"""Checkpoints of fp8 matrices with scales: merged as the values they stand for, and written so again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.cli import main
from sd_mecha.errors import FileFormatError, OptionError
from sd_mecha.storage.quantised.scaled_fp8 import quantized

ROWS, COLUMNS = 300, 130


def scaled(scale: torch.Tensor, name: str = "scale_weight", seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, COLUMNS, generator=generator).to(torch.float8_e4m3fn)
    return {
        "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "blocks.0.attn.weight": values,
        f"blocks.0.attn.{name}": scale,
        "blocks.0.attn.bias": torch.ones(ROWS),
    }


def _blocks(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scale of every value of a matrix in blocks; the last block of a row or column may be shorter."""
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:ROWS, :COLUMNS]


def merged(*models: dict[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    recipe = sd_mecha.n_average(*(sd_mecha.model(m) for m in models))
    return dict(sd_mecha.merge(recipe, output_dtype=None, **options) or {})


@pytest.mark.parametrize(
    ("scale", "spread"),
    [
        (torch.tensor(0.25), lambda s: s),
        (torch.tensor([3.0]), lambda s: s),
        (torch.rand(ROWS) + 0.5, lambda s: s[:, None]),
        (torch.rand(ROWS, 1) + 0.5, lambda s: s),
        (torch.rand(3, 2) + 0.5, lambda s: _blocks(s, 128, 128)),
        (torch.rand(12, 26) + 0.5, lambda s: _blocks(s, 25, 5)),
    ],
    ids=["number", "one", "rows", "column", "blocks", "parts"],
)
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_matrices_are_read_times_their_scale(scale: torch.Tensor, spread: Any, name: str) -> None:
    model = scaled(scale, name)
    expected = model["blocks.0.attn.weight"].float() * spread(scale)
    got = merged(model, model)
    assert set(got) - {"__metadata__"} == {"blocks.0.attn.weight", "blocks.0.attn.bias"}
    assert torch.equal(got["blocks.0.attn.weight"], expected)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch has no dtype of powers of two")
def test_scales_may_be_powers_of_two() -> None:
    scale = (torch.arange(6, dtype=torch.uint8) + 124).reshape(3, 2).view(torch.float8_e8m0fnu)
    model = scaled(scale, "weight_scale_inv")
    powers = torch.tensor([[0.125, 0.25], [0.5, 1.0], [2.0, 4.0]])
    expected = model["blocks.0.attn.weight"].float() * _blocks(powers, 128, 128)
    assert torch.equal(merged(model)["blocks.0.attn.weight"], expected)


def test_scales_of_activations_go_with_the_fp8_values() -> None:
    model = {**scaled(torch.tensor(1.0)), "blocks.0.attn.scale_input": torch.tensor(9.0)}
    assert "blocks.0.attn.scale_input" not in merged(model)


def test_a_plain_and_a_scaled_model_merge() -> None:
    one = scaled(torch.tensor(2.0))
    plain = {"blocks.0.attn.weight": torch.zeros(ROWS, COLUMNS), "blocks.0.attn.bias": torch.zeros(ROWS)}
    got = merged(plain, one)
    assert torch.equal(got["blocks.0.attn.weight"], one["blocks.0.attn.weight"].float())


@pytest.mark.parametrize("budget", [1 << 28, 1 << 16])
@pytest.mark.parametrize("threads", [0, 2])
def test_written_as_fp8_with_scales(tmp_path: Path, threads: int, budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model = {
        "head.weight": torch.randn(8, 8, generator=generator),
        "blocks.0.attn.weight": torch.randn(700, 520, generator=generator) * 40,
        "blocks.1.attn.weight": torch.zeros(4, 4),
        "blocks.1.norm.weight": torch.ones(4),
    }
    path = tmp_path / "out.safetensors"
    recipe = sd_mecha.model(model)
    sd_mecha.merge(
        recipe, output=path, output_dtype=None, scaled_fp8=True, threads=threads, total_buffer_size=budget, tqdm=None
    )
    stored = load_file(path)
    assert stored["blocks.0.attn.weight"].dtype == torch.float8_e4m3fn
    assert "scaled_fp8" in stored
    assert torch.equal(stored["head.weight"], model["head.weight"])
    assert stored["blocks.1.norm.weight"].dtype == torch.float32
    values = stored["blocks.0.attn.weight"].float() * stored["blocks.0.attn.scale_weight"]
    largest = model["blocks.0.attn.weight"].abs().max()
    error = (values - model["blocks.0.attn.weight"]).abs()
    assert (error <= model["blocks.0.attn.weight"].abs() / 16 + largest * 2**-16).all()  # half a unit of e4m3
    assert values.abs().max() == pytest.approx(largest.item(), rel=1e-6)
    again = sd_mecha.merge(sd_mecha.model(path), output_dtype=None, tqdm=None)
    assert torch.equal(again["blocks.0.attn.weight"], values)
    assert torch.equal(again["blocks.1.attn.weight"], torch.zeros(4, 4))


def test_a_scale_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(scaled(torch.ones(7)), path)
    with pytest.raises(
        FileFormatError, match=r"bad\.safetensors: scale 'blocks\.0\.attn\.scale_weight' of shape \(7,\)"
    ):
        sd_mecha.merge(sd_mecha.model(path), tqdm=None)


def test_streams_refuse_scales() -> None:
    with pytest.raises(OptionError, match="scaled_fp8"):
        list(sd_mecha.stream(sd_mecha.model({"w": torch.ones(1)}), scaled_fp8=True))


def test_from_the_command_line(tmp_path: Path) -> None:
    save_file({"blocks.0.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    recipe = tmp_path / "r.mecha"
    recipe.write_text(sd_mecha.serialize(sd_mecha.model(str(tmp_path / "a.safetensors"))))
    result = CliRunner().invoke(main, ["merge", str(recipe), "-o", str(tmp_path / "o.safetensors"), "--scaled-fp8"])
    assert result.exit_code == 0, result.output
    assert load_file(tmp_path / "o.safetensors")["blocks.0.weight"].dtype == torch.float8_e4m3fn


def written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is read again of a model that was written as scaled fp8."""
    path = tmp_path / "scaled.safetensors"
    sd_mecha.merge(sd_mecha.model(tensors), output=path, scaled_fp8=True, output_dtype=None, tqdm=None)
    found = sd_mecha.merge(sd_mecha.model(path), output_dtype=None, tqdm=None, omit_non_finite_inputs=False)
    assert found is not None
    return dict(found)


def test_a_matrix_whose_scale_has_a_name_of_the_model_is_written_as_it_is(tmp_path: Path) -> None:
    tensors = {"blocks.2.weight": torch.full((2, 2), 3.0), "blocks.2.scale_weight": torch.ones(3)}
    found = written(tmp_path, tensors)
    assert found["blocks.2.weight"].tolist() == [[3.0, 3.0]] * 2
    assert found["blocks.2.scale_weight"].tolist() == [1.0] * 3


def test_matrices_that_are_empty_or_tiny(tmp_path: Path) -> None:
    tensors = {
        "blocks.0.weight": torch.ones(4, 4),
        "blocks.1.weight": torch.ones(0, 4),
        "blocks.2.weight": torch.tensor([[1e-44, 0.0]]),
    }
    found = written(tmp_path, tensors)
    assert found["blocks.0.weight"].tolist() == [[1.0] * 4] * 4
    assert found["blocks.1.weight"].shape == (0, 4)
    assert found["blocks.2.weight"].abs().max() < 1e-30


def test_one_infinite_value_does_not_spoil_the_others() -> None:
    values, scale = quantized(torch.tensor([[torch.inf, 2.0, -0.5]]))
    assert (values.to(torch.float32) * scale)[0, 1:].tolist() == [2.0, -0.5]


@pytest.mark.parametrize("shape", [(0, 2), (200, 1), (299, 130)])
def test_scales_that_stand_for_no_blocks_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(FileFormatError, match="does not fit the fp8 matrix"):
        merged(scaled(torch.ones(shape)))
