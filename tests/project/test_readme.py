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


def test_the_example_method_takes_the_larger_value(models: dict[str, torch.Tensor]) -> None:
    nodes = {name: sd_mecha.model(f"{name}.safetensors") for name in models}
    exec(blocks("python")[1], nodes)
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
