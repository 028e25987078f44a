"""Adapters in the folders that PEFT saves: the strength that it keeps in a file of its own counts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sd_mecha
from sd_mecha.errors import ChangedInputError, FileFormatError
from sd_mecha.extensions import model_formats
from sd_mecha.storage import peft
from sd_mecha.storage.locations import locate


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


BASE = {"layers.0.q.weight": rand(8, 6), "layers.1.q.weight": rand(8, 6, seed=1)}
FACTORS = {
    f"base_model.model.layers.{n}.q.lora_{side}.weight": rand(*shape, seed=n)
    for n in (0, 1)
    for side, shape in (("A", (2, 6)), ("B", (8, 2)))
}


def saved(folder: Path, config: Any, factors: dict[str, Tensor] = FACTORS) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder


def strengths(path: Path) -> list[float]:
    """How often the product of its factors each layer gets."""
    found = sd_mecha.merge(sd_mecha.apply_adapter(BASE, path, strict=True), output_dtype=None, tqdm=None)
    assert found is not None
    result = []
    for n in (0, 1):
        key, name = f"layers.{n}.q.weight", f"base_model.model.layers.{n}.q"
        product = FACTORS[f"{name}.lora_B.weight"] @ FACTORS[f"{name}.lora_A.weight"]
        change = found[key] - BASE[key]
        result.append(float((change * product).sum() / product.square().sum()))
        torch.testing.assert_close(change, result[-1] * product, rtol=1e-4, atol=1e-5)
    return result


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lora_alpha": 8, "r": 2}, [4.0, 4.0]),
        ({"lora_alpha": 8, "r": 2, "use_rslora": True}, [8 / 2**0.5] * 2),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {"1.q": 6}}, [1.0, 3.0]),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {r"layers\.\d+\.q": 5}}, [2.5, 2.5]),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {"^layers.1.q": 6, "^1.q": 8, "ayers.0.q": 8}}, [1.0, 3.0]),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {".*layers.*[01].(q|k)": 5, "1.q": 6}}, [2.5, 2.5]),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {"1.q": 6, "^.*q$": 5, "q": 8}}, [2.5, 3.0]),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {r"layers.*(?<!0)\.q": 5}}, [1.0, 2.5]),
        ({"r": 2}, [1.0, 1.0]),
    ],
)
def test_the_strength_beside_the_factors_counts(tmp_path: Path, config: dict[str, Any], expected: list[float]) -> None:
    folder = saved(tmp_path / "adapter", config)
    assert strengths(folder) == pytest.approx(expected)
    assert strengths(folder / "adapter_model.safetensors") == pytest.approx(expected)


def test_factors_without_a_configuration_count_as_they_are(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", {"lora_alpha": 8})
    (folder / "adapter_config.json").unlink()
    assert strengths(folder / "adapter_model.safetensors") == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "not valid JSON"),
        ({"lora_alpha": "x"}, "lora_alpha: got 'x', expected a number"),
        ({"lora_alpha": 1, "alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern: got '(a+)+b'"),
        ({"lora_alpha": 1, "alpha_pattern": {"(": 1}}, "alpha_pattern: got '('"),
        ({"lora_alpha": 1, "alpha_pattern": {".*" * 40 + "!": 1}}, "alpha_pattern: got '.*.*"),
        ({"lora_alpha": 1, "alpha_pattern": {"a?" * 40 + "!": 1}}, "alpha_pattern: got 'a?a?"),
        ({"lora_alpha": 1, "alpha_pattern": {"(?:a|a)" * 25: 1}}, "alpha_pattern: got '(?:a|a)"),
        ({"lora_alpha": 1, "alpha_pattern": {"(?x:(a+) +)b": 1}}, "alpha_pattern: got '(?x:(a+) +)b'"),
        ({"lora_alpha": 1, "alpha_pattern": {f"(q)!{n}": 1 for n in range(20_000)}}, "alpha_pattern: got '(q)!"),
        ({"lora_alpha": 1, "alpha_pattern": [1]}, "alpha_pattern: got [1]"),
        ({"lora_alpha": 1, "fan_in_fan_out": True}, "fan_in_fan_out is set"),
    ],
)
def test_a_configuration_that_cannot_be_followed(tmp_path: Path, config: Any, says: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        strengths(saved(tmp_path / "adapter", config))
    assert says in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


def test_expressions_for_many_experts_are_not_taken_for_endless_ones() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
        for layer in range(48)
        for expert in range(128)
        for name in ("gate", "up", "down")
    ]
    patterns = [
        r"layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj",
        r"layers\.[0-9]+\.mlp\.experts\.\d+\.down_proj",
        r"model\.layers\..*(?<!up)_proj",
    ]
    found = peft._own_alphas(dict(zip(patterns, (1, 2, 3), strict=True)), names, "x")
    assert sorted(found.values()) == [1.0] * 2 * 48 * 128 + [2.0] * 48 * 128
    hostile = [name + "1" * 40 for name in names]
    for pattern in (r"\d*" * 5 + "!", r"[^x]*\S*!", "1*" * 5 + "!"):
        with pytest.raises(FileFormatError):
            peft._own_alphas({pattern: 1}, hostile, "x")


def test_a_strength_that_cannot_be_shown_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    factors = {"base_model.model.layers.0.q.lokr_w1": rand(2, 2), "base_model.model.layers.0.q.lokr_w2": rand(4, 3)}
    folder = saved(tmp_path / "adapter", {"alpha": 4, "r": 2}, factors)
    with caplog.at_level(logging.WARNING, "sd_mecha"):
        sd_mecha.merge(sd_mecha.apply_adapter(BASE, folder, strict=True), tqdm=None)
    assert "alpha / r is left out" in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saved_merges_as_peft_merges_it(tmp_path: Path, rslora: bool) -> None:
    library = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(8, 6)})
    base = {key: value.clone() for key, value in model.state_dict().items()}
    pattern = {} if rslora else {"rank_pattern": {"second": 3}, "alpha_pattern": {"second": 1}}
    config = library.LoraConfig(r=2, lora_alpha=7, target_modules=["first", "second"], use_rslora=rslora, **pattern)
    trained = library.get_peft_model(model, config)
    for parameter in trained.parameters():
        nn.init.normal_(parameter.data, std=0.5) if parameter.requires_grad else None
    trained.save_pretrained(tmp_path)
    found = sd_mecha.merge(sd_mecha.apply_adapter(base, tmp_path, strict=True), output_dtype=None, tqdm=None)
    assert found is not None
    for key, expected in trained.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[key], expected, rtol=1e-5, atol=1e-5)


def test_a_strength_that_changes_makes_another_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", {"lora_alpha": 8, "r": 2})
    reader: Any = model_formats.open_model(locate(folder))
    before = reader.fingerprint
    reader.check_unchanged()
    (folder / "adapter_config.json").write_text('{"lora_alpha": 800}')
    with pytest.raises(ChangedInputError):
        reader.check_unchanged()
    reader.close()
    other: Any = model_formats.open_model(locate(folder))
    assert other.fingerprint != before
    other.close()
