"""The examples of the README work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.chdir(tmp_path)
    made = {name: torch.randn(6, 4) for name in ("a", "b", "base")}
    for name, weight in made.items():
        save_file({"weight": weight}, f"{name}.safetensors")
    return made


def test_the_python_example_and_the_text_give_the_same_right_result(models: dict[str, torch.Tensor]) -> None:
    exec(blocks("python")[0], {})
    (text,) = blocks("mecha")
    from_text = sd_mecha.merge(sd_mecha.deserialize(text))
    merged = load_file("merged.safetensors")["weight"]
    expected = models["a"] + 0.8 * (models["b"] - models["base"])
    torch.testing.assert_close(merged.float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged, from_text["weight"])


def test_the_example_with_an_adapter_and_weights(models: dict[str, torch.Tensor]) -> None:
    names = [f"layers.{i}.{part}.weight" for i in range(2) for part in ("attn.to_q", "mlp.up")]
    for name in ("a", "base"):
        save_file({key: torch.full((4, 4), float(name == "base")) for key in names}, f"{name}.safetensors")
    up, down = torch.ones(4, 1), torch.ones(1, 4)
    factors = {"layers.1.mlp.up.lora_up.weight": up, "layers.1.mlp.up.lora_down.weight": down}
    save_file(factors, "style.safetensors")
    nodes = {name: sd_mecha.model(f"{name}.safetensors") for name in models}
    exec(blocks("python")[1], nodes | {"sd_mecha": sd_mecha})
    merged = load_file("styled.safetensors")
    expected = dict(zip(names, (0.5, 0.2, 0.5, 1.8), strict=True))
    assert {key: tensor[0, 0].item() for key, tensor in merged.items()} == pytest.approx(expected, abs=1e-3)


def test_the_example_method_takes_the_larger_value(models: dict[str, torch.Tensor]) -> None:
    nodes = {name: sd_mecha.model(f"{name}.safetensors") for name in models}
    exec(blocks("python")[2], nodes)
    a, b = models["a"], models["b"]
    expected = torch.where(a.abs() >= b.abs(), a, b)
    torch.testing.assert_close(load_file("larger.safetensors")["weight"], expected.half())


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links
    missing = [
        link for link in links if not link.startswith("http") and not (Path(__file__).parents[2] / link).exists()
    ]
    assert missing == []
