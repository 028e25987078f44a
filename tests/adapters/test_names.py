"""Whose weights the names of adapters mean, in the naming styles of the programs that write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sd_mecha.extensions import model_configs
from tests.adapters.makers import ENDINGS, change, drawn, lora, tensors_of

FLUX = "flux1.width16_head4_double2_single2_inputs4_outputs4_context8_pooled6_guided1"
WAN = "wan.width16_inner32_depth2_channels4_output4_context8_image0"


def check(
    config: str, key: str, adapter: dict[str, Tensor], expected: Tensor, rows: tuple[int, int] | None = None
) -> None:
    """The adapter changes one key of a model, or some rows of it, and nothing else."""
    others = [k for k in model_configs.resolve(config).keys() if k != key and k.endswith(".bias")][:2]  # noqa: SIM118
    base = tensors_of(config, key, *others)
    found = change(base, adapter, config)
    assert set(found) == {key}
    delta = torch.zeros_like(base[key])
    delta[slice(*rows) if rows else slice(None)] = expected.reshape(delta[slice(*rows) if rows else slice(None)].shape)
    torch.testing.assert_close(found[key], delta, rtol=1e-4, atol=1e-5)


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SD1_MODULES = [
    ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "kohya"),
    ("lycoris_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "kohya"),
    ("lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "kohya"),
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "kohya"),
    (f"unet.{ATTENTION}", "peft"),
    (f"unet.{ATTENTION}", "peft named"),
    (f"base_model.model.{ATTENTION}", "peft"),
    (f"base_model.model.unet.{ATTENTION}", "peft"),
    (f"unet.{ATTENTION}", "diffusers"),
    (f"unet.{ATTENTION}", "diffusers linear"),
    ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "kohya"),
    ("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "peft"),
    (ATTENTION, "peft bare"),
]


@pytest.mark.parametrize(("module", "style"), SD1_MODULES)
def test_the_unet_of_sd1(module: str, style: str) -> None:
    adapter, expected = lora(module, 640, 640, style=style)
    check("sd1-ldm", "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", adapter, expected)


def test_attention_processors_of_the_first_diffusers() -> None:
    up, down = drawn(640, 2), drawn(2, 640)
    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor"
    adapter = {f"{block}.to_out_lora.up.weight": up, f"{block}.to_out_lora.down.weight": down}
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.weight"
    check("sd1-ldm", key, adapter, up @ down)


def test_a_convolution_of_sd1() -> None:
    up, down = drawn(320, 2, 1, 1), drawn(2, 4, 3, 3)
    adapter = {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.lora_down.weight": down}
    check(
        "sd1-ldm",
        "model.diffusion_model.input_blocks.0.0.weight",
        adapter,
        torch.einsum("or,rikl->oikl", up[..., 0, 0], down),
    )


@pytest.mark.parametrize(
    "module", ["lora_te_text_model_encoder_layers_3_mlp_fc1", "text_encoder.text_model.encoder.layers.3.mlp.fc1"]
)
def test_the_text_encoder_of_sd1(module: str) -> None:
    adapter, expected = lora(module, 3072, 768)
    check("sd1-ldm", "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight", adapter, expected)


@pytest.mark.parametrize(
    ("module", "key", "size"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "input_blocks.4.1.proj_in", (640, 640)),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "input_blocks.4.1.proj_in", (640, 640)),
        ("unet.down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in", (640, 640)),
        ("diffusion_model.middle_block.1.proj_out", "middle_block.1.proj_out", (1280, 1280)),
        ("lora_unet_mid_block_attentions_0_proj_out", "middle_block.1.proj_out", (1280, 1280)),
        ("lora_unet_add_embedding_linear_1", "label_emb.0.0", (1280, 2816)),
    ],
)
def test_the_unet_of_sdxl(module: str, key: str, size: tuple[int, int]) -> None:
    adapter, expected = lora(module, *size)
    check("sdxl-sgm", f"model.diffusion_model.{key}.weight", adapter, expected)


@pytest.mark.parametrize("prefix", ["lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.", "clip_l."])
def test_the_smaller_text_encoder_of_sdxl(prefix: str) -> None:
    adapter, expected = lora(
        f"{prefix}text_model.encoder.layers.0.mlp.fc2".replace(".", "_" if prefix.endswith("_") else "."), 768, 3072
    )
    check(
        "sdxl-sgm", "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc2.weight", adapter, expected
    )


@pytest.mark.parametrize("prefix", ["lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.", "clip_g."])
@pytest.mark.parametrize(("part", "number"), [("q", 0), ("k", 1), ("v", 2)])
def test_attention_of_the_larger_text_encoder_of_sdxl_lies_in_one_tensor(prefix: str, part: str, number: int) -> None:
    module = f"{prefix}text_model.encoder.layers.0.self_attn.{part}_proj"
    adapter, expected = lora(module.replace(".", "_") if prefix.startswith("lora") else module, 1280, 1280)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    check("sdxl-sgm", key, adapter, expected, rows=(1280 * number, 1280 * (number + 1)))


def test_the_projection_of_the_larger_text_encoder_of_sdxl_is_transposed() -> None:
    adapter, expected = lora("lora_te2_text_projection", 1280, 1280)
    check("sdxl-sgm", "conditioner.embedders.1.model.text_projection", adapter, expected.mT)


@pytest.mark.parametrize("style", ENDINGS)
@pytest.mark.parametrize(("part", "number"), [("q", 0), ("k", 1), ("v", 2)])
def test_flux_in_the_layout_of_diffusers(part: str, number: int, style: str) -> None:
    adapter, expected = lora(f"transformer.transformer_blocks.1.attn.to_{part}", 16, 16, style=style)
    key = "double_blocks.1.img_attn.qkv.weight"
    rows = 16 * number, 16 * (number + 1)
    check(f"{FLUX}-original", key, adapter, expected, rows)
    check(f"{FLUX}-comfyui", f"model.diffusion_model.{key}", adapter, expected, rows)


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lora_unet_", "lycoris_transformer_", "lycoris_"])
def test_flux_in_the_layout_of_diffusers_by_flat_names(prefix: str) -> None:
    adapter, expected = lora(f"{prefix}single_transformer_blocks_0_proj_mlp", 64, 16)
    check(f"{FLUX}-original", "single_blocks.0.linear1.weight", adapter, expected, rows=(48, 112))


@pytest.mark.parametrize(
    "module",
    [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "transformer.double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_attn.qkv",
    ],
)
def test_flux_in_its_own_layout(module: str) -> None:
    adapter, expected = lora(module, 48, 16)
    check(f"{FLUX}-original", "double_blocks.0.img_attn.qkv.weight", adapter, expected)
    check(f"{FLUX}-comfyui", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight", adapter, expected)


def test_several_modules_of_one_fused_weight() -> None:
    key, module = "single_blocks.0.linear1.weight", "transformer.single_transformer_blocks.0."
    first, q = lora(f"{module}attn.to_q", 16, 16, rank=1)
    second, v = lora(f"{module}attn.to_v", 16, 16, rank=3)
    third, mlp = lora(f"{module}proj_mlp", 64, 16)
    scaled = {**first, **second, **third, f"{module}attn.to_v.alpha": torch.tensor(6.0)}
    check(f"{FLUX}-original", key, scaled, torch.cat([q, torch.zeros(16, 16), 2 * v, mlp]))


def test_a_fused_weight_on_a_model_that_has_it_in_parts() -> None:
    up, down = drawn(48, 2), drawn(2, 16)
    module = "lora_unet_double_blocks_0_txt_attn_qkv"
    adapter = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    keys = [f"transformer_blocks.0.attn.add_{part}_proj.weight" for part in "qkv"]
    found = change(tensors_of(f"{FLUX}-diffusers", *keys), adapter, f"{FLUX}-diffusers")
    assert set(found) == set(keys)
    for key, rows in zip(keys, (up @ down).chunk(3), strict=True):
        torch.testing.assert_close(found[key], rows, rtol=1e-4, atol=1e-5)


def test_halves_that_change_places() -> None:
    adapter, expected = lora("transformer.norm_out.linear", 32, 16)
    check(f"{FLUX}-original", "final_layer.adaLN_modulation.1.weight", adapter, torch.cat(expected.chunk(2)[::-1]))


def test_lengths_of_one_part_of_a_fused_weight() -> None:
    key, module = "double_blocks.0.img_attn.qkv.weight", "transformer.transformer_blocks.0.attn.to_k"
    base = tensors_of(f"{FLUX}-original", key)
    adapter, delta = lora(module, 16, 16, style="peft")
    lengths = drawn(16).abs()
    found = change(base, {**adapter, f"{module}.lora_magnitude_vector": lengths}, f"{FLUX}-original")[key]
    changed = base[key][16:32] + delta
    expected = changed / changed.norm(dim=1, keepdim=True) * lengths[:, None] - base[key][16:32]
    torch.testing.assert_close(found[16:32], expected, rtol=1e-4, atol=1e-5)
    assert not found[:16].any()
    assert not found[32:].any()


@pytest.mark.parametrize(
    ("module", "key", "size"),
    [
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            (3072, 768),
        ),
        (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            (3072, 768),
        ),
        (
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
            "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            (4096, 4096),
        ),
        (
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            (4096, 4096),
        ),
        (
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
            "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            (4096, 4096),
        ),
    ],
)
def test_the_text_encoders_of_flux(module: str, key: str, size: tuple[int, int]) -> None:
    adapter, expected = lora(module, *size)
    check("flux-flux", f"text_encoders.{key}.weight", adapter, expected)


@pytest.mark.parametrize("config", ["sd3-comfyui", "sd35_medium-comfyui"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_text_encoders_of_sd3(config: str, number: int) -> None:
    name, width = {1: ("clip_l", 768), 2: ("clip_g", 1280)}[number]
    adapter, expected = lora(f"lora_te{number}_text_model_encoder_layers_0_self_attn_q_proj", width, width)
    key = f"text_encoders.{name}.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    check(config, key, adapter, expected)


@pytest.mark.parametrize(
    "module",
    [
        "diffusion_model.blocks.1.self_attn.q",
        "lora_unet_blocks_1_self_attn_q",
        "blocks.1.self_attn.q",
        "transformer.blocks.1.attn1.to_q",
        "base_model.model.blocks.1.attn1.to_q",
        "lora_transformer_blocks_1_attn1_to_q",
    ],
)
@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers"])
def test_wan(module: str, layout: str) -> None:
    adapter, expected = lora(module, 16, 16)
    name = "blocks.1.attn1.to_q" if layout == "diffusers" else "blocks.1.self_attn.q"
    prefix = "model.diffusion_model." if layout == "comfyui" else ""
    check(f"{WAN}-{layout}", f"{prefix}{name}.weight", adapter, expected)


def test_parameters_without_a_module_of_their_own() -> None:
    base = tensors_of(f"{WAN}-original", "blocks.0.modulation", "blocks.0.norm3.bias")
    stored = {"diffusion_model.blocks.0.modulation.diff": drawn(1, 6, 16, of="x")}
    stored |= {"diffusion_model.blocks.0.norm3.diff_b": drawn(16, of="x")}
    found = change(base, stored, f"{WAN}-original")
    for key, expected in zip(base, stored.values(), strict=True):
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "network."])
@pytest.mark.parametrize("module", ["lora_unet_layers_0_proj", "base_model.model.layers.0.proj", "{}layers.0.proj"])
def test_a_model_of_unknown_architecture(prefix: str, module: str) -> None:
    base = {f"{prefix}layers.{i}.proj.weight": drawn(6, 4, of=str(i)) for i in range(3)}
    adapter, expected = lora(module.format(prefix), 6, 4)
    found = change(base, adapter)
    assert set(found) == {f"{prefix}layers.0.proj.weight"}
    torch.testing.assert_close(found[f"{prefix}layers.0.proj.weight"], expected, rtol=1e-4, atol=1e-5)


def test_other_layouts_of_sdxl() -> None:
    adapter, expected = lora("lora_unet_input_blocks_4_1_proj_in", 640, 640)
    check("sdxl-diffusers_unet_only", "down_blocks.1.attentions.0.proj_in.weight", adapter, expected)
    check("sdxl-kohya", "unet.input_blocks.4.1.proj_in.weight", adapter, expected)
    check("sdxl-kohya_but_diffusers", "unet.down_blocks.1.attentions.0.proj_in.weight", adapter, expected)
