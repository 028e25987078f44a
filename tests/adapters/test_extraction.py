"""Adapters extracted from the difference of two models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd_mecha
from sd_mecha.adapters.factors import low_rank
from sd_mecha.adapters.ranks import rank_rule
from sd_mecha.adapters.styles import STYLES
from sd_mecha.cli import main
from sd_mecha.errors import AdapterError, ParameterError, PlanError, ShapeError
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.adapter_links import layouts_of
from sd_mecha.extensions.adapter_names import names_of

Models = tuple[dict[str, Tensor], dict[str, Tensor]]
RANK = 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(rank: int | None = RANK) -> Models:
    """A model, and one that differs from it by changes of a rank."""
    base = {
        "blocks.0.attn.weight": rand(24, 40),
        "blocks.0.attn.bias": rand(24),
        "blocks.1.attn.weight": rand(40, 24, seed=1),
        "blocks.1.norm.weight": rand(24, seed=1),
        "conv.weight": rand(12, 8, 3, 3),
        "same.weight": rand(8, 8),
    }
    tuned = {}
    for key, weight in base.items():
        if key == "same.weight":
            tuned[key] = weight.clone()
        elif weight.dim() < 2 or rank is None:
            tuned[key] = weight + rand(*weight.shape, seed=9) / 4
        else:
            change = rand(weight.shape[0], rank, seed=3) @ rand(rank, weight[0].numel(), seed=4)
            tuned[key] = weight + change.reshape(weight.shape) / 8
    return tuned, base


def applied(adapter: dict[str, Any], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base with the adapter, as the reader of adapters understands it."""
    made = sd_mecha.merge(sd_mecha.apply_adapter(sd_mecha.model(base), adapter, strict=True), output_dtype=None)
    assert made is not None
    return {key: made[key] for key in base}


def facts(found: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(found["__metadata__"]["mecha_adapter"])
    return told


@pytest.mark.parametrize("randomized", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_a_planted_rank_is_recovered_and_read_back_in_every_style(style: str, randomized: bool) -> None:
    tuned, base = pair()
    made = sd_mecha.extract_adapter(tuned, base, rank=RANK, style=style, randomized=randomized, dtype="fp32")
    got = applied(made, base)
    for key, weight in base.items():
        torch.testing.assert_close(got[key], tuned[key] if weight.dim() > 1 else weight, rtol=1e-4, atol=1e-4)
    assert facts(made)["error"] < 1e-5
    assert {m["rank"] for m in facts(made)["modules"].values()} == {RANK}
    assert len(facts(made)["modules"]) == 3
    assert ("lora_unet_conv.alpha" in made) == (style == "kohya")


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_biases_and_norms_are_stored_on_request(style: str) -> None:
    tuned, base = pair()
    made = sd_mecha.extract_adapter(tuned, base, rank=RANK, style=style, diffs=True, dtype="fp32")
    got = applied(made, base)
    for key in base:
        torch.testing.assert_close(got[key], tuned[key], rtol=1e-4, atol=1e-4)


def test_what_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sd_mecha"):
        sd_mecha.extract_adapter(*pair(), rank=RANK)
    assert "2 tensors that differ have no place" in caplog.text
    assert "'blocks.0.attn.bias'" in caplog.text
    assert "diffs=True" in caplog.text


@pytest.mark.parametrize("randomized", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.95])
@pytest.mark.parametrize("name", ["energy", "frobenius"])
def test_a_share_is_kept_with_no_more_rank_than_it_takes(name: str, share: float, randomized: bool) -> None:
    tuned, base = pair(rank=None)
    arguments: dict[str, Any] = {name: share}
    made = sd_mecha.extract_adapter(tuned, base, **arguments, dtype="fp32", randomized=randomized)
    for key, module in (("blocks.0.attn.weight", "blocks_0_attn"), ("conv.weight", "conv")):
        s = torch.linalg.svdvals((tuned[key] - base[key]).flatten(1).double())
        kept = (s**2).cumsum(0) / (s**2).sum()
        kept = kept.sqrt() if name == "frobenius" else kept
        told = facts(made)["modules"][f"lora_unet_{module}"]
        assert told["rank"] == int((kept < share).sum()) + 1
        energy = float(((s**2).cumsum(0) / (s**2).sum())[told["rank"] - 1])
        assert told["error"] == pytest.approx((1 - energy) ** 0.5, abs=1e-4)


def test_a_share_of_a_large_matrix_is_found_without_decomposing_it_in_full() -> None:
    rule = rank_rule("test", None, None, 0.9, None)
    assert rule is not None
    q = [torch.linalg.qr(rand(400, 300, seed=i)).Q for i in range(2)]
    for decay, limit in ((0.9, 30), (0.985, 90)):  # found at the first guess, and at the second
        s = decay ** torch.arange(300.0)
        matrix = (q[0] * s) @ q[1].mT[:300]
        needed = int(((s**2).cumsum(0) / (s**2).sum() < 0.9).sum()) + 1
        up, down = low_rank(matrix, rule, False)
        assert needed <= up.shape[1] <= needed + 1 <= limit
        assert float((up @ down).norm() ** 2 / matrix.norm() ** 2) >= 0.9 - 1e-4


def test_small_matrices_have_no_more_rank_than_they_can_and_kernels_may_have_less() -> None:
    tuned, base = pair(rank=None)
    made = sd_mecha.extract_adapter(tuned, base, rank=20, conv_rank=2)
    ranks = {name: m["rank"] for name, m in facts(made)["modules"].items()}
    assert ranks == {"lora_unet_blocks_0_attn": 20, "lora_unet_blocks_1_attn": 20, "lora_unet_conv": 2}
    assert made["lora_unet_conv.lora_down.weight"].shape == (2, 8, 3, 3)
    assert made["lora_unet_conv.lora_up.weight"].shape == (12, 2, 1, 1)
    assert sd_mecha.extract_adapter(tuned, base, rank=20)["lora_unet_conv.alpha"] == 12
    bounded = sd_mecha.extract_adapter(tuned, base, energy=0.99, rank=4)
    assert {m["rank"] for m in facts(bounded)["modules"].values()} == {4}


def test_one_seed_gives_one_adapter() -> None:
    models = {"a.weight": rand(80, 90)}, {"a.weight": torch.zeros(80, 90)}
    first, again, other = (sd_mecha.extract_adapter(*models, rank=1, iterations=0, seed=seed) for seed in (1, 1, 2))
    key = "lora_unet_a.lora_up.weight"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("style", ["kohya", "comfyui", "peft"])
def test_a_planted_kronecker_product_is_recovered(style: str) -> None:
    base = {"a.weight": rand(24, 40), "k.weight": rand(16, 8, 3, 3)}
    w2 = rand(4, 2) @ rand(2, 8)
    change = torch.kron(rand(6, 5), w2)
    kernel = torch.kron(rand(4, 2)[..., None, None], rand(4, 4, 3, 3))
    tuned = {"a.weight": base["a.weight"] + change, "k.weight": base["k.weight"] + kernel}
    several: list[dict[str, Any]] = [{}, {"rank": 2, "conv_rank": 4}]
    for arguments in several:
        made = sd_mecha.extract_adapter(
            tuned, base, kind="lokr", style=style, dtype="fp32", kronecker_ratio=0.5, **arguments
        )
        shapes = {key.rpartition(".")[2]: tuple(t.shape) for key, t in made.items() if ".a." in key or "_a." in key}
        errors = facts(made)["modules"]
        module = next(name for name in errors if name.endswith("a"))
        got = applied(made, base)
        if shapes["lokr_w1"] == (6, 5):
            assert errors[module]["error"] < 1e-4
        for key in base:
            missed = float((got[key] - tuned[key]).norm() / (tuned[key] - base[key]).norm())
            name = next(name for name in errors if name.endswith(key[0]))
            assert errors[name]["error"] == pytest.approx(missed, abs=1e-4)
    assert "rank" in errors[module]


def test_a_delta_alone_will_do_and_recipes_too() -> None:
    tuned, base = pair()
    delta = sd_mecha.model(tuned) - sd_mecha.model(base)
    made, again = sd_mecha.extract_adapter(delta, rank=RANK), sd_mecha.extract_adapter(tuned, base, rank=RANK)
    assert made.keys() == again.keys()
    assert all(torch.equal(made[key], again[key]) for key in made if key != "__metadata__")


def test_diffusers_is_told_the_ranks_that_differ() -> None:
    tuned, base = pair(rank=None)
    made = sd_mecha.extract_adapter(tuned, base, rank=6, conv_rank=2, style="diffusers")
    told = json.loads(made["__metadata__"]["lora_adapter_metadata"])
    assert told["transformer.r"] == told["transformer.lora_alpha"] == 6
    assert told["transformer.rank_pattern"] == told["transformer.alpha_pattern"] == {"conv": 2}
    assert told["transformer.target_modules"] == ["blocks.0.attn", "blocks.1.attn", "conv"]


def test_modules_are_those_of_the_layout_that_the_style_uses() -> None:
    """Of a fused weight of the model's own layout, diffusers adapts its parts."""
    key = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    base = {key: torch.zeros(9216, 3072)}
    change = rand(9216, 1) @ rand(1, 3072)
    delta = sd_mecha.model({key: change}, "flux-flux", "delta")
    for style, names in (
        ("kohya", ["lora_unet_double_blocks_0_img_attn_qkv"]),
        ("comfyui", ["diffusion_model.double_blocks.0.img_attn.qkv"]),
        ("diffusers", [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "kqv"]),
    ):
        made = sd_mecha.extract_adapter(delta, rank=1, style=style, dtype="fp32")
        assert sorted(facts(made)["modules"]) == names
        node = sd_mecha.apply_adapter(sd_mecha.model(base, "flux-flux"), made, strict=True)
        got = sd_mecha.merge(node, output_dtype=None)
        assert got is not None
        torch.testing.assert_close(got[key], change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["sd1-ldm", "sdxl-sgm", "sd3-comfyui", "flux-flux", "wan21_t2v_1.3b-comfyui"])
def test_names_mean_the_weight_that_they_are_made_of(name: str, style: str) -> None:
    config = model_configs.resolve(name)
    layout = STYLES[style].layout(config)
    names = names_of(config)
    links = {there.identifier: found for there, found in layouts_of(config)}[layout.identifier]
    checked = 0
    for component, keys in layout.components().items():
        for key, metadata in keys.keys().items():
            module = STYLES[style].module(layout, component, key.removesuffix(".weight"))
            shape = metadata.shape or ()
            if module is None or not key.endswith(".weight") or len(shape) < 2 or "embedding" in key:
                continue
            if key not in links or "text_projection" in key:
                continue
            found = names.find(module, "weight")
            assert found is not None, module
            assert found.parts == links[key].parts, module
            checked += 1
    assert checked > 100


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ParameterError, "got no rank"),
    ({"rank": 0}, ParameterError, "rank is 0"),
    ({"rank": 100}, ParameterError, "no matrix has more than 24"),
    ({"energy": -0.1}, ParameterError, "energy is -0.1"),
    ({"rank": 1, "kind": "loha"}, ParameterError, "kind is 'loha'"),
    ({"rank": 1, "style": "nope"}, ParameterError, "style is 'nope'"),
    ({"rank": 1, "iterations": -1}, ParameterError, "iterations is -1"),
    ({"kind": "lokr", "kronecker_ratio": 2}, ParameterError, "kronecker_ratio is 2"),
    ({"rank": 1, "style": "peft", "diffs": True}, ParameterError, "no names for changes of biases"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD)
def test_arguments_out_of_range(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sd_mecha.extract_adapter(*pair(), **arguments)


def test_models_that_give_nothing_to_extract(tmp_path: Path) -> None:
    tuned, base = pair()
    out = tmp_path / "out.safetensors"
    with pytest.raises(AdapterError, match="do not differ"):
        sd_mecha.extract_adapter(base, dict(base), rank=2, output=out)
    only = {**base, "blocks.0.attn.bias": tuned["blocks.0.attn.bias"]}
    with pytest.raises(AdapterError, match=r"only where an adapter has no place, such as in 'blocks.0.attn.bias'"):
        sd_mecha.extract_adapter(only, base, rank=2, output=out)
    with pytest.raises(ShapeError, match="shape"):
        sd_mecha.extract_adapter(tuned, {**base, "conv.weight": torch.zeros(12, 8, 1, 1)}, rank=2, output=out)
    with pytest.raises(AdapterError, match="no key in common"):
        sd_mecha.extract_adapter(tuned, {"other.weight": torch.zeros(2, 2)}, rank=2, output=out)
    assert not out.exists()


def test_two_names_that_become_one_are_refused() -> None:
    base = {"a.b.weight": torch.zeros(4, 4), "a_b.weight": torch.zeros(4, 4)}
    tuned = {key: rand(4, 4) for key in base}
    with pytest.raises(AdapterError, match="two modules are called"):
        sd_mecha.extract_adapter(tuned, base, rank=1)
    assert len(facts(sd_mecha.extract_adapter(tuned, base, rank=1, style="peft"))["modules"]) == 2


def test_models_of_different_architectures_are_refused() -> None:
    first, second = (
        {key: torch.zeros(4, 4) for key in list(model_configs.resolve(name).keys())[:40]}
        for name in ("sd1-ldm", "flux-flux")
    )
    with pytest.raises(PlanError):
        sd_mecha.extract_adapter(first, second, rank=1)


def test_the_comparison_lists_the_worst_weights_first() -> None:
    tuned, base = pair()
    made = sd_mecha.extract_adapter(tuned, base, rank=1, conv_rank=RANK, dtype="fp32")
    found = sd_mecha.compare_adapter(made, tuned, base)
    worst, *_, best = found.changed()
    assert {w.key for w in found.changed()} == base.keys() - {"same.weight"}
    assert worst.error == pytest.approx(1.0)
    assert worst.key in ("blocks.0.attn.bias", "blocks.1.norm.weight")
    assert best.key == "conv.weight"
    assert best.error < 1e-4
    told = facts(made)["modules"]["lora_unet_blocks_0_attn"]["error"]
    by_key = {w.key: w for w in found.weights}
    assert by_key["blocks.0.attn.weight"].error == pytest.approx(told, abs=1e-4)
    assert str(found).splitlines()[0].split() == ["error", "difference", "weight"]
    beyond = sd_mecha.compare_adapter({"same.diff": torch.ones(8, 8)}, tuned, base).changed()[0]
    assert beyond.key == "same.weight"
    assert beyond.error == float("inf")
    with pytest.raises(AdapterError):
        sd_mecha.compare_adapter({"nowhere.diff": torch.ones(8, 8)}, tuned, base)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tuned, base = pair()
    save_file(tuned, "tuned.safetensors")
    save_file(base, "base.safetensors")
    result = call("extract", "tuned.safetensors", "base.safetensors", "--rank", "3", "-o", "a.safetensors")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("a.safetensors: 3 modules, rank 3, relative error 0.000")
    assert load_file("a.safetensors")["lora_unet_conv.lora_up.weight"].dtype == torch.float16
    with safe_open("a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mecha_adapter"])["kind"] == "lora"
    result = call("adapter-error", "a.safetensors", "tuned.safetensors", "base.safetensors")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith("total")
    result = call(
        *("extract", "tuned.safetensors", "base.safetensors", "--energy", "0.5", "--style", "peft", "--exact"),
        *("--dtype", "fp32", "-o", "b.safetensors"),
    )
    assert result.exit_code == 0, result.stderr
    assert "base_model.model.conv.lora_A.weight" in load_file("b.safetensors")
    result = call("extract", "tuned.safetensors", "base.safetensors", "--rank", "0", "-o", "c.safetensors")
    assert result.exit_code == 1
    assert "rank is 0" in result.stderr
    assert not Path("c.safetensors").exists()
    result = call("extract", "base.safetensors", "base.safetensors", "--rank", "2", "-o", "c.safetensors")
    assert "do not differ" in result.stderr
    assert not Path("c.safetensors").exists()
