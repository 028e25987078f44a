"""Blocks are found in the keys alone, named without ambiguity, and come in order of depth."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from sd_mecha.extensions import model_configs
from sd_mecha.extensions.blocks import blocks_of, find_blocks
from sd_mecha.extensions.layer_types import LAYER_TYPES, layer_type
from sd_mecha.extensions.model_configs import ModelConfigImpl, StructuralModelConfig


def layers(path: str, count: int, start: int = 0) -> list[str]:
    return [f"{path}.{i}.{name}.weight" for i in range(start, start + count) for name in ("attn.qkv", "mlp.0")]


def names(*keys: Iterable[str]) -> list[str]:
    return list(blocks_of(StructuralModelConfig([key for group in keys for key in group])))


def test_a_block_holds_its_keys_and_no_others() -> None:
    keys = [*layers("double_blocks", 2), "img_in.weight", "final_layer.linear.weight"]
    assert dict(blocks_of(StructuralModelConfig(keys))) == {
        "double_blocks.0": ("double_blocks.0.attn.qkv.weight", "double_blocks.0.mlp.0.weight"),
        "double_blocks.1": ("double_blocks.1.attn.qkv.weight", "double_blocks.1.mlp.0.weight"),
    }


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net.", "model.", ""])
def test_the_wrapper_of_the_network_is_no_part_of_a_name(prefix: str) -> None:
    assert names(layers(f"{prefix}layers", 2)) == ["layers.0", "layers.1"]


def test_names_that_would_be_one_stay_whole() -> None:
    assert names(layers("model.layers", 2), layers("net.layers", 2)) == [
        *("model.layers.0", "model.layers.1", "net.layers.0", "net.layers.1")
    ]


@pytest.mark.parametrize(
    "keys",
    [
        ["time_embed.0.weight", "time_embed.0.bias", "time_embed.2.weight"],  # steps of a sequence
        ["label_emb.0.0.weight", "label_emb.0.2.weight"],
        [f"caption_projection.{i}.linear.weight" for i in range(3)],
        layers("layers", 1),  # a single one is no list
        ["a", "b.0", "0.1.2"],
    ],
)
def test_numbers_alone_make_no_blocks(keys: list[str]) -> None:
    assert names(keys) == []


def test_numbers_sort_as_numbers_whatever_the_order_of_the_keys() -> None:
    keys = layers("single_blocks", 12) + layers("double_blocks", 2)
    expected = [*(f"double_blocks.{i}" for i in range(2)), *(f"single_blocks.{i}" for i in range(12))]
    assert names(sorted(keys)) == names(keys[::-1]) == expected


def test_side_networks_come_before_the_network() -> None:
    found = names(layers("layers", 2), layers("noise_refiner", 2), layers("txt_in.individual_token_refiner.blocks", 2))
    assert found[-2:] == ["layers.0", "layers.1"]


def test_sd1_has_25_blocks_in_its_network_and_more_in_its_other_components() -> None:
    config = model_configs.resolve("sd1-ldm")
    unet = [block.name for block in find_blocks(config) if not block.owner]
    inputs, outputs = ([f"{side}_blocks.{i}" for i in range(12)] for side in ("input", "output"))
    assert unet == [*inputs, "middle_block", *outputs]
    others = [name for name in blocks_of(config) if name not in unet]
    assert others[:12] == [f"clip_l.layers.{i}" for i in range(12)]
    assert others[12:17] == [*(f"vae.encoder.down.{i}" for i in range(4)), "vae.encoder.mid"]
    assert others[17:] == ["vae.decoder.mid", *(f"vae.decoder.up.{i}" for i in (3, 2, 1, 0))]


def test_no_key_is_in_two_blocks() -> None:
    found = [key for keys in blocks_of(model_configs.resolve("sd1-ldm")).values() for key in keys]
    assert len(found) == len(set(found)) > 900


def test_components_put_their_name_before_their_blocks() -> None:
    components = {
        "diffuser": dict.fromkeys(layers("model.diffusion_model.double_blocks", 2)),
        "t5xxl": dict.fromkeys([*layers("text_encoders.t5xxl.encoder.block", 2), "text_encoders.t5xxl.shared.weight"]),
    }
    found = blocks_of(ModelConfigImpl("test-blocks", components))
    assert list(found) == ["double_blocks.0", "double_blocks.1", "t5xxl.block.0", "t5xxl.block.1"]


def test_the_text_encoder_of_an_unknown_model_is_not_its_network() -> None:
    keys = layers("cond_stage_model.layers", 2) + layers("model.diffusion_model.blocks", 2)
    owners = {block.name: block.owner for block in find_blocks(StructuralModelConfig(keys))}
    assert owners == {
        "cond_stage_model.layers.0": "cond_stage_model",
        "cond_stage_model.layers.1": "cond_stage_model",
        "blocks.0": "",
        "blocks.1": "",
    }


def test_blocks_are_found_once_for_each_config() -> None:
    config = StructuralModelConfig(layers("layers", 2))
    assert find_blocks(config) is find_blocks(config)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", "attention.q"),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias", "attention.out"),
        ("input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight", "mlp"),
        ("input_blocks.1.1.transformer_blocks.0.norm2.weight", "norm"),
        ("input_blocks.1.0.in_layers.0.weight", "norm"),
        ("input_blocks.1.0.in_layers.2.weight", None),
        ("down_blocks.0.attentions.0.proj_in.weight", None),
        ("time_embed.0.weight", "embedding"),
        ("first_stage_model.decoder.mid.attn_1.proj_out.weight", "attention.out"),
        ("text_model.encoder.layers.3.self_attn.k_proj.bias", "attention.k"),
        ("text_model.embeddings.token_embedding.weight", "embedding"),
        ("conditioner.embedders.1.model.transformer.resblocks.5.mlp.c_fc.weight", "mlp"),
        ("transformer.resblocks.5.attn.in_proj_weight", "attention.qkv"),
        ("model.layers.7.input_layernorm.weight", "norm"),
        ("model.layers.7.self_attn.o_proj.weight", "attention.out"),
        ("model.layers.7.mlp.down_proj.weight", "mlp"),
        ("model.embed_tokens.weight", "embedding"),
        ("encoder.block.3.layer.0.SelfAttention.v.weight", "attention.v"),
        ("encoder.block.3.layer.1.DenseReluDense.wo.weight", "mlp"),
        ("double_blocks.0.img_attn.qkv.weight", "attention.qkv"),
        ("double_blocks.0.img_attn_proj.weight", "attention.out"),
        ("double_blocks.0.img_mod.lin.weight", None),
        ("single_blocks.0.linear1.weight", None),
        ("blocks.0.adaln_modulation_self_attn.1.weight", None),
        ("t_embedder.mlp.0.weight", "embedding"),
        ("decoder.middle.0.residual.0.gamma", "norm"),
        ("weight", None),
    ],
)
def test_types_of_layers_are_told_by_their_names(key: str, kind: str | None) -> None:
    assert layer_type(key) == kind
    assert kind is None or kind in LAYER_TYPES
