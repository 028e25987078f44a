"""Adapter files as wholes: what is left out, what is refused, and the ways to apply them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd_mecha
from sd_mecha.cli import main
from sd_mecha.errors import AdapterError, ConfigError, ShapeError
from sd_mecha.extensions import adapters
from sd_mecha.extensions.adapters import AdapterKind, register_adapter
from tests.adapters.makers import applied, change, drawn, lora, tensors_of

BASE = {"proj.weight": drawn(6, 4), "proj.bias": drawn(6), "out.weight": drawn(4, 6)}
GOOD, DELTA = lora("proj", 6, 4)


def refused(adapter: dict[str, Tensor], folder: Path, *words: str, base: dict[str, Tensor] | None = None) -> None:
    """Refused while planning, naming the file and more, and nothing is written."""
    paths = [folder / "base.safetensors", folder / "adapter.safetensors", folder / "out.safetensors"]
    save_file(base or BASE, paths[0])
    save_file({key: tensor.contiguous() for key, tensor in adapter.items()}, paths[1])
    with pytest.raises((AdapterError, ShapeError)) as caught:
        sd_mecha.merge(sd_mecha.apply_adapter(paths[0], paths[1]), output=paths[2], tqdm=None)
    assert not paths[2].exists()
    for word in words:
        assert word in str(caught.value), caught.value


def test_an_adapter_for_another_architecture(tmp_path: Path) -> None:
    adapter, _ = lora("lora_unet_input_blocks_4_1_proj_in", 640, 640)
    refused(adapter, tmp_path, "another architecture", "adapter.safetensors", "lora_unet_input_blocks_4_1_proj_in")
    base = tensors_of("sd1-ldm", "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight")
    adapter, _ = lora("lora_unet_double_blocks_0_img_attn_qkv", 48, 16)
    refused(adapter, tmp_path, "another architecture", "sd1-ldm", base=base)


def test_a_file_that_is_no_adapter(tmp_path: Path) -> None:
    refused(dict(BASE), tmp_path, "adapter.safetensors", "no adapter file", "'proj.weight'", "lokr")


def test_an_unknown_algorithm(tmp_path: Path) -> None:
    refused(
        {"proj.vera_lambda_b": drawn(6), "proj.vera_lambda_d": drawn(2)}, tmp_path, "no adapter file", "vera_lambda_b"
    )


@pytest.mark.parametrize(
    ("lost", "kind", "part"),
    [
        ("lora_up.weight", "lora", "up"),
        ("lora_down.weight", "lora", "down"),
        ("hada_w2_b", "loha", "hada_w2_b"),
        ("lokr_w2", "lokr", "lokr_w2"),
        ("a2.weight", "glora", "a2"),
        ("weight", "ia3", "plain_weight"),
    ],
)
def test_half_of_a_pair(lost: str, kind: str, part: str, tmp_path: Path) -> None:
    parts = {
        "lora": ("lora_up.weight", "lora_down.weight"),
        "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        "lokr": ("lokr_w1", "lokr_w2"),
        "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        "ia3": ("weight", "on_input"),
    }[kind]
    adapter = {f"out.{name}": drawn(2, 2) for name in parts if name != lost}
    refused({**GOOD, **adapter}, tmp_path, "adapter.safetensors", "'out'", f"half of a {kind}", f"no {part!r}")


@pytest.mark.parametrize("style", ["peft", "diffusers"])
def test_styles_that_are_mixed(style: str, tmp_path: Path) -> None:
    other, _ = lora("out", 4, 6, style=style)
    refused(
        {**GOOD, **other}, tmp_path, "adapter.safetensors", "mixes styles", "'proj.lora_down.weight'", f"style {style}"
    )


def test_a_module_named_in_two_ways(tmp_path: Path) -> None:
    other, _ = lora("lora_unet_proj", 6, 4)
    refused({**GOOD, **other}, tmp_path, "mixes styles", "'proj'", "'lora_unet_proj'", "'proj.weight'")
    peft, _ = lora("proj", 6, 4, style="peft")
    refused({**GOOD, **peft}, tmp_path, "twice", "'proj.lora_down.weight'", "'proj.lora_A.weight'")


def test_several_kinds_in_one_module(tmp_path: Path) -> None:
    refused({**GOOD, "proj.diff": drawn(6, 4)}, tmp_path, "'proj'", "two kinds at once", "full", "lora")


def test_ranks_that_differ(tmp_path: Path) -> None:
    adapter = {"proj.lora_up.weight": drawn(6, 2), "proj.lora_down.weight": drawn(3, 4)}
    refused(adapter, tmp_path, "'proj.lora_up.weight' (6, 2)", "'proj.lora_down.weight' (3, 4)", "(6, 4)")


def test_shapes_that_the_model_does_not_have(tmp_path: Path) -> None:
    adapter, _ = lora("proj", 5, 4)
    refused(adapter, tmp_path, "proj.weight", "(6, 4)", "(5, 4)", "base.safetensors", "adapter.safetensors")


def test_lengths_that_the_weight_does_not_have(tmp_path: Path) -> None:
    refused({**GOOD, "proj.dora_scale": drawn(5, 1)}, tmp_path, "'proj'", "(5, 1)", "(6, 4)")


def test_shapes_that_a_part_of_a_fused_weight_does_not_have(tmp_path: Path) -> None:
    config = "flux1.width16_head4_double2_single2_inputs4_outputs4_context8_pooled6_guided1-original"
    base = tensors_of(config, "double_blocks.0.img_attn.qkv.weight")
    adapter, _ = lora("transformer.transformer_blocks.0.attn.to_q", 17, 16)
    with pytest.raises(ShapeError, match=r"to_q.*\(17, 16\).*\(16, 16\)"):
        applied(base, adapter, config)


STRAY = {**GOOD, **lora("nowhere", 4, 4)[0], "position_ids": torch.arange(3.0)}


def test_what_changes_nothing_is_named_in_one_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "stray.safetensors"
    save_file(STRAY, path)
    base = sd_mecha.model(BASE)
    twice = sd_mecha.apply_adapter(sd_mecha.apply_adapter(base, path), path, alpha=0.5)
    with caplog.at_level(logging.WARNING, "sd_mecha"):
        merged = sd_mecha.merge(twice, output_dtype=None, tqdm=None)
    (warning,) = [record.message for record in caplog.records if "stray" in record.message]
    assert "2 modules or keys" in warning
    assert "'nowhere'" in warning
    assert "'position_ids'" in warning
    assert merged is not None
    torch.testing.assert_close(merged["proj.weight"], BASE["proj.weight"] + 1.5 * DELTA)


def test_what_changes_nothing_is_an_error_where_that_is_asked_for() -> None:
    base = sd_mecha.model(BASE)
    with pytest.raises(AdapterError, match="nowhere"):
        sd_mecha.merge(sd_mecha.apply_adapter(base, STRAY, strict=True))
    with pytest.raises(AdapterError, match="nowhere"):
        sd_mecha.merge(sd_mecha.apply_adapter(base, STRAY), strict_adapters=True)
    assert set(change(BASE, GOOD)) == {"proj.weight"}


def test_weights_that_the_model_lacks_are_named() -> None:
    known = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    base = tensors_of("sd1-ldm", known)
    here, delta = lora("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
    there, _ = lora("lora_te_text_model_encoder_layers_0_mlp_fc2", 768, 3072)
    with pytest.raises(AdapterError, match="layers_0_mlp_fc2"):
        applied(base, {**here, **there}, "sd1-ldm")
    found = applied(base, {**here, **there}, "sd1-ldm", strict=False)
    torch.testing.assert_close(found[known], base[known] + delta)
    lengths = {"lora_te_text_model_encoder_layers_0_mlp_fc2.dora_scale": drawn(768, 1)}
    with pytest.raises(AdapterError, match="layers_0_mlp_fc2"):  # needs the weight even for the delta alone
        applied(base, {**here, **there, **lengths}, "sd1-ldm")


def test_what_an_adapter_does_not_change_stays_bit_for_bit() -> None:
    base = {**BASE, "half.weight": drawn(5, 5).to(torch.bfloat16), "zero": torch.tensor([-0.0])}
    found = applied(base, GOOD)
    for key in base.keys() - {"proj.weight"}:
        assert torch.equal(found[key].view(torch.uint8), base[key].to(found[key].dtype).view(torch.uint8))


def test_many_adapters_in_one_recipe() -> None:
    recipe, expected = sd_mecha.model(BASE), BASE["proj.weight"].double()
    for number in range(20):
        up, down = drawn(6, 2, of=str(number)), drawn(2, 4, of=str(number))
        adapter = {"proj.lora_up.weight": up, "proj.lora_down.weight": down}
        recipe = sd_mecha.apply_adapter(recipe, adapter, alpha=0.1)
        expected = expected + 0.1 * (up.double() @ down.double())
    merged = sd_mecha.merge(recipe, output_dtype=None, tqdm=None)
    assert merged is not None
    torch.testing.assert_close(merged["proj.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_recipe_with_an_adapter_is_read_back(tmp_path: Path) -> None:
    save_file(BASE, tmp_path / "base.safetensors")
    save_file(GOOD, tmp_path / "lora.safetensors")
    recipe = sd_mecha.apply_adapter(
        tmp_path / "base.safetensors", tmp_path / "lora.safetensors", alpha=0.5, strict=True
    )
    text = sd_mecha.serialize(recipe)
    assert sd_mecha.serialize(sd_mecha.deserialize(text)) == text
    path, out = tmp_path / "recipe.mecha", tmp_path / "out.safetensors"
    path.write_text(text)
    arguments = ["merge", str(path), "-o", str(out), "--dtype", "fp32", "--strict-adapters"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(load_file(out)["proj.weight"], BASE["proj.weight"] + DELTA / 2)


def test_the_flag_of_the_command_line(tmp_path: Path) -> None:
    save_file(BASE, tmp_path / "base.safetensors")
    save_file(STRAY, tmp_path / "lora.safetensors")
    recipe = sd_mecha.apply_adapter(tmp_path / "base.safetensors", tmp_path / "lora.safetensors")
    path, out = tmp_path / "recipe.mecha", tmp_path / "out.safetensors"
    path.write_text(sd_mecha.serialize(recipe))
    result = CliRunner().invoke(main, ["merge", str(path), "-o", str(out), "--strict-adapters"])
    assert result.exit_code != 0
    assert "'nowhere'" in result.output
    assert not out.exists()


def test_convert_leads_from_an_adapter_to_a_delta() -> None:
    base = sd_mecha.model(BASE)
    delta = sd_mecha.convert(sd_mecha.model(GOOD), base)
    merged = sd_mecha.merge(base + delta | base, output_dtype=None, tqdm=None)
    assert merged is not None
    torch.testing.assert_close(merged["proj.weight"], BASE["proj.weight"] + DELTA)


def test_convert_leads_from_an_adapter_to_a_config() -> None:
    key = "double_blocks.0.img_attn.qkv.weight"
    config = "flux1.width16_head4_double2_single2_inputs4_outputs4_context8_pooled6_guided1-original"
    adapter, expected = lora("transformer.transformer_blocks.0.attn.to_q", 16, 16, style="peft")
    delta = sd_mecha.convert(sd_mecha.model(adapter), config)
    merged = sd_mecha.merge(delta, strict_merge_space="delta", output_dtype=None, tqdm=None)
    assert merged is not None
    torch.testing.assert_close(merged[key][:16], expected)
    assert not merged[key][16:].any()


def test_convert_prefers_an_adapter_to_a_conversion_that_would_lose_parts_of_it() -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    base = tensors_of("sd1-ldm", key, "model.diffusion_model.input_blocks.0.0.bias")
    up, down = drawn(320, 2, 1, 1), drawn(2, 4, 3, 3)
    plain = {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.lora_down.weight": down}
    node = sd_mecha.model(base, "sd1-ldm")
    by_configs = sd_mecha.convert(sd_mecha.model(plain, "sd1-kohya_kohya_lora"), node)
    assert by_configs.merge_method.identifier == "convert_'sd1-kohya'_to_'sd1-ldm'"  # type: ignore[attr-defined]
    whole = sd_mecha.convert(sd_mecha.model({**plain, "lora_unet_conv_in.dora_scale": drawn(320, 1, 1, 1)}), node)
    assert whole.merge_method.identifier == "adapter_delta"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError):
        sd_mecha.convert(sd_mecha.model(base, "sd1-ldm"), "flux-flux")


def test_a_kind_of_somebody_else() -> None:
    def delta(parts: dict[str, Tensor], shape: tuple[int, ...], base: Tensor | None) -> Tensor:
        return parts["sign"] * parts["size"]

    kind = AdapterKind("signed", {"common": {"sgn": "sign", "abs": "size"}}, (frozenset({"sign", "size"}),), delta)
    register_adapter(kind)
    try:
        signs, sizes = drawn(6, 4).sign(), drawn(6, 4, of="size").abs()
        found = change(BASE, {"lora_unet_proj.sgn": signs, "lora_unet_proj.abs": sizes})
        torch.testing.assert_close(found["proj.weight"], signs * sizes)
    finally:
        adapters.remove("signed")
    with pytest.raises(AdapterError, match="no adapter file"):
        applied(BASE, {"lora_unet_proj.sgn": signs, "lora_unet_proj.abs": sizes})
