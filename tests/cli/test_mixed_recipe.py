"""What people do: a checkpoint, adapters of three trainers with weights of their own, and the VAE of another file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.cli import main

UNET = "model.diffusion_model."
QUERY = "{}.1.transformer_blocks.0.attn1.to_q.weight"
KEYS = {
    **{UNET + QUERY.format(f"input_blocks.{i}"): (640, 640) for i in (4, 5)},
    UNET + QUERY.format("output_blocks.3"): (640, 640),
    UNET + "time_embed.0.bias": (1280,),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768),
    "first_stage_model.quant_conv.bias": (8,),
    "first_stage_model.post_quant_conv.bias": (4,),
}
IN4, IN5, OUT3, *_ = KEYS


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "other")):
        tensors = {key: random(*shape, seed=10 * seed + i) for i, (key, shape) in enumerate(KEYS.items())}
        save_file(tensors, f"{name}.safetensors")
    kohya = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{kohya}.lora_up.weight": random(640, 4, seed=100),
            f"{kohya}.lora_down.weight": random(4, 640, seed=101),
            f"{kohya}.alpha": torch.tensor(2.0),
        },
        "kohya.safetensors",
    )
    peft = "base_model.model.down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{peft}.lora_A.weight": random(4, 640, seed=102), f"{peft}.lora_B.weight": random(640, 4, seed=103)},
        "peft.safetensors",
    )
    lokr = "lycoris_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{lokr}.lokr_w1": random(8, 8, seed=104),
            f"{lokr}.lokr_w2": random(80, 80, seed=105),
            f"{lokr}.alpha": torch.tensor(1.0),
        },
        "lokr.safetensors",
    )
    return tmp_path


def test_it_merges_from_the_command_line(folder: Path) -> None:
    base = sd_mecha.model("base.safetensors", config="sdxl-sgm")
    other = sd_mecha.model("other.safetensors", config="sdxl-sgm")
    blocks = {"IN04": 0.5, **{f"IN{i:02}": 0.0 for i in range(9) if i != 4}}
    blocks |= {"BASE": 0.0, "M00": 0.0, "VAE": 0.0, **{f"OUT{i:02}": 0.0 for i in range(9)}}
    weights = {
        "kohya": sd_mecha.convert(sd_mecha.literal(blocks, config="sdxl-supermerger_blocks"), base),
        "peft": sd_mecha.weights({"block:input_blocks.5": 0.25}),
        "lokr": sd_mecha.weights({"type:attention.q": 2.0}),
    }
    recipe = base
    for name, alpha in weights.items():
        recipe = sd_mecha.apply_adapter(recipe, f"{name}.safetensors", alpha=alpha)
    recipe = sd_mecha.pick_component(other, "vae") | recipe
    (folder / "mixed.mecha").write_text(sd_mecha.serialize(recipe), encoding="utf-8")

    result = CliRunner().invoke(main, ["merge", "mixed.mecha", "--dtype", "fp32", "--no-progress"])
    assert result.exit_code == 0, result.output
    merged, a, b = (load_file(f"{name}.safetensors") for name in ("mixed", "base", "other"))
    assert set(merged) == set(KEYS)
    expected = dict(a)
    expected |= {key: tensor for key, tensor in b.items() if key.startswith("first_stage_model.")}
    expected[IN4] = a[IN4] + 0.5 * (2 / 4) * random(640, 4, seed=100) @ random(4, 640, seed=101)
    expected[IN5] = a[IN5] + 0.25 * random(640, 4, seed=103) @ random(4, 640, seed=102)
    expected[OUT3] = a[OUT3] + 2.0 * torch.kron(random(8, 8, seed=104), random(80, 80, seed=105))
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
