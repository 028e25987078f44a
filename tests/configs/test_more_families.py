"""Wan, LTX-Video, Cosmos Predict2, HiDream, PixArt, Qwen-Image, Z-Image and Lumina-Image 2 in their layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.builtin.configs.cosmos import Cosmos
from sd_mecha.builtin.configs.hidream import HiDream
from sd_mecha.builtin.configs.ltxv import Ltxv
from sd_mecha.builtin.configs.lumina import Lumina, ZImage
from sd_mecha.builtin.configs.pixart import PixArt
from sd_mecha.builtin.configs.qwen_image import QwenImage
from sd_mecha.builtin.configs.wan import Wan
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import ModelConfig
from tests.configs.listings import (
    Listing,
    best,
    check_there_and_back,
    converted,
    digest,
    family,
    mandatory,
    optional,
    tensors,
    thinned,
    with_averages,
)

LISTINGS = [
    Listing(
        "wan21-t2v-1.3b",
        "wan21_t2v_1.3b-original",
        825,
        "1eeef4faaf35e41a3b9558293a74811437d8eef2fa243b715fc31b968bd8b084",
    ),
    Listing(
        "diffusers-wan21-t2v-1.3b",
        "wan21_t2v_1.3b-diffusers",
        825,
        "f550e6244e09c92f9ea65479e293f22ec6549eacf22c10c8b543963db5b134d3",
    ),
    Listing(
        "wan21-t2v-14b",
        "wan21_t2v_14b-original",
        1095,
        "42dd629e94053a2f4147e5c36f56da35ee15bea2276b651211ae8d18f85d9d96",
    ),
    Listing(
        "diffusers-wan21-t2v-14b",
        "wan21_t2v_14b-diffusers",
        1095,
        "97d609e745e3ca36ccbf69cd72abad057903256025480ececf41305ed81e76ac",
    ),
    Listing(
        "wan21-i2v-14b",
        "wan21_i2v_14b-original",
        1303,
        "66fe883173edb3786680ac4e0c10fa6e78ae3feb37f1a3c3a3ca5bb8734ef445",
    ),
    Listing(
        "diffusers-wan21-i2v-14b",
        "wan21_i2v_14b-diffusers",
        1303,
        "a59e5192c8b88dc382f439d92c7a509b4a6a53173264a0efe31ae40c989737ef",
    ),
    Listing(
        "wan22-i2v-a14b",
        "wan22_i2v_a14b-original",
        1095,
        "0bdd669cdf1b5b95a0188d9c454d851a2055ee26cd4ec0f895962c3d424b7b41",
    ),
    Listing(
        "diffusers-wan22-i2v-a14b",
        "wan22_i2v_a14b-diffusers",
        1095,
        "b3dfddcad0e2997a57984296ceac7efd6d5621854ca5b3168856c06d980a53cb",
    ),
    Listing(
        "wan22-ti2v-5b",
        "wan22_ti2v_5b-original",
        825,
        "c591e56da95dd020b01acd4d972835402a34d9c5eecf383b53dcad7bfdc51968",
    ),
    Listing(
        "diffusers-wan22-ti2v-5b",
        "wan22_ti2v_5b-diffusers",
        825,
        "853466a84756f93362d9a10890de486722303641d9dfb6409f213cabcd33b699",
    ),
    Listing(
        "ltxv-2b-v0.9",
        "ltxv_2b_v0.9-comfyui",
        715,
        "147b4cc348a31b4fdd8499b1d2a470b5fe343fe5ab4ae8b2354412c96d4cb36d",
    ),
    Listing(
        "diffusers-ltxv-2b-v0.9",
        "ltxv_2b_v0.9-diffusers",
        715,
        "bed88b3e1842f076d992d061a4da0f017fd4d277d3b4f147fb7813e5201e00dd",
    ),
    Listing(
        "ltxv-13b-v0.9.7",
        "ltxv_13b_v0.9.7-comfyui",
        1215,
        "0319ccc3762dfc37fc256bcd730d642c06b428caaaa4cc71377d4ef6488c8ba8",
    ),
    Listing(
        "diffusers-ltxv-13b-v0.9.7",
        "ltxv_13b_v0.9.7-diffusers",
        1215,
        "f913c6ac286ef3ade05cbdab6f4ebf16ae86c09a2aa7689f60439bcac5739d8a",
    ),
    Listing(
        "cosmos-predict2-2b-t2i",
        "cosmos_predict2_2b_t2i-comfyui",
        567,
        "45a4c6d9dc1852783cc5e849597e7fa879ce05f12a0dd3d1298f6ae73fa43dbb",
    ),
    Listing(
        "diffusers-cosmos-predict2-2b-t2i",
        "cosmos_predict2_2b_t2i-diffusers",
        567,
        "22b986bf16e456355e8d58b8858166408999edf4d20ef8a4b742409fbbd783b0",
    ),
    Listing(
        "cosmos-predict2-2b-v2w",
        "cosmos_predict2_2b_v2w-comfyui",
        567,
        "68f0d0ddf14f1aaf57f298d8ae5ba8eeb26cb9066d95dae6a7c73af76b36b9c6",
    ),
    Listing(
        "cosmos-predict2-14b-t2i",
        "cosmos_predict2_14b_t2i-comfyui",
        727,
        "49adcd64de367242b6a1f05ad4a7f139da4471f38b6624dc1cbc34ddbee15b17",
    ),
    Listing(
        "diffusers-cosmos-predict2-14b-t2i",
        "cosmos_predict2_14b_t2i-diffusers",
        727,
        "fd5234c489611db430ed7cb75886ecfbdd916dc82a5b5a146f9deee77a203f36",
    ),
    Listing(
        "hidream-i1",
        "hidream_i1-original",
        1615,
        "fd11d0bca45e972bc07c88704200aa1961512a6924618ef1a2889b7d274d04fe",
    ),
    Listing(
        "diffusers-hidream-i1",
        "hidream_i1-original",
        1615,
        "fd11d0bca45e972bc07c88704200aa1961512a6924618ef1a2889b7d274d04fe",
    ),
    Listing(
        "pixart-sigma-xl-2-1024-ms",
        "pixart_sigma_xl_2_1024_ms-original",
        436,
        "2b5d35c4ee1a93e130388d1b8ea55e185299409f4092ee9498fd1f25faef7d84",
    ),
    Listing(
        "diffusers-pixart-sigma-xl-2-1024-ms",
        "pixart_sigma_xl_2_1024_ms-diffusers",
        603,
        "e6f4f63ee3e35734acb2118a119dbf6eded96ce28e44bbbfd3fd6fa176ac0653",
    ),
    Listing(
        "qwen-image",
        "qwen_image-original",
        1933,
        "28681cef22fad99ee7a4982888a55c213af4eeb165b027903680510de219aeac",
    ),
    Listing(
        "diffusers-qwen-image",
        "qwen_image-original",
        1933,
        "28681cef22fad99ee7a4982888a55c213af4eeb165b027903680510de219aeac",
    ),
    Listing(
        "z-image-comfyui",
        "z_image-original",
        453,
        "ac95b364d24214feec0f6149d4b45d4f4b2ca8c1f639b42be745a536ec368955",
    ),
    Listing(
        "diffusers-z-image",
        "z_image-diffusers",
        521,
        "83b3e7c5e906b767977ee4e87a628ca94d06905584fde4505b6540151f759848",
    ),
    Listing(
        "lumina2",
        "lumina2-original",
        399,
        "9495ee0ae0dc46c3a5f393529da87853bf37de480d8b4c7ecc196f60dca70e95",
    ),
    Listing(
        "diffusers-lumina2",
        "lumina2-diffusers",
        459,
        "0abfa3eb03fc0abeaac3d2a4a0c9a0b19e9be9e71e563fc1a86bf5be47adc323",
    ),
]

# family -> a small size, and what its layout of diffusers has no place for
SMALL: dict[str, tuple[object, set[str]]] = {
    "wan": (Wan(8, 16, 2, 5, 4, 12, 1), set()),
    "ltxv": (Ltxv(8, 2, 4, 12), set()),
    "cosmospredict2": (
        Cosmos(16, 4, 2, 17, 12),
        {"pos_embedder.seq", "pos_embedder.dim_spatial_range", "pos_embedder.dim_temporal_range"},
    ),
    "hidream": (HiDream(8, 12, 6, 3, 1, 2, 4, 12, 10), set()),
    "pixart": (PixArt(8, 2, 4, 12, 20, 16), {"pos_embed", "y_embedder.y_embedding"}),
    "qwenimage": (QwenImage(8, 4, 2, 4, 12), set()),
    "zimage": (ZImage(16, 4, 24, 2, 1, 4, 12), {"norm_final.weight"}),
    "lumina2": (Lumina(16, 4, 24, 2, 1, 4, 12, shared=8), {"norm_final.weight"}),
}

# the only tensor that tells versions of Wan apart which were given more channels
TELLING = "patch_embedding.weight"


def small(name: str, layout: str) -> ModelConfig:
    return family(name).config(SMALL[name][0], layout)


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.name)
def test_keys_and_shapes(listing: Listing) -> None:
    keys = mandatory(model_configs.resolve(listing.config))
    assert (len(keys), digest(keys)) == (listing.keys, listing.digest)


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        (
            "cosmos_predict2_14b_t2i-comfyui",
            {
                "net.pos_embedder.seq": (240,),
                "net.pos_embedder.dim_spatial_range": (21,),
                "net.pos_embedder.dim_temporal_range": (22,),
            },
        ),
        ("pixart_sigma_xl_2_1024_ms-original", {"pos_embed": (1, 4096, 1152)}),
        ("qwen_image-original", {"__index_timestep_zero__": (0,)}),
        ("z_image-original", {"norm_final.weight": (3840,)}),
        ("lumina2-original", {"norm_final.weight": (2304,)}),
        ("wan21_t2v_14b-original", {}),
        ("lumina2-diffusers", {}),
    ],
)
def test_keys_that_files_may_lack(identifier: str, expected: dict[str, tuple[int, ...]]) -> None:
    assert optional(model_configs.resolve(identifier)) == expected


@pytest.mark.parametrize("name", SMALL)
def test_comfyui_is_the_original_layout_below_a_prefix(name: str) -> None:
    prefix = "net." if name == "cosmospredict2" else "model.diffusion_model."
    original, comfyui = (mandatory(small(name, layout)) for layout in ("original", "comfyui"))
    assert comfyui == {prefix + key: shape for key, shape in original.items()}


def test_layouts_with_the_same_names_are_one() -> None:
    assert {name for name in SMALL if "diffusers" not in family(name).layouts} == {"hidream", "qwenimage"}


@pytest.mark.parametrize("identifier", sorted({listing.config for listing in LISTINGS}))
def test_inference(identifier: str) -> None:
    shapes = mandatory(model_configs.resolve(identifier))
    assert best(shapes) == [identifier]
    for seed in range(5):
        assert best(with_averages(thinned(shapes, seed, keep=[TELLING]))) == [identifier]


def test_a_file_that_does_not_tell_versions_apart_may_be_either() -> None:
    shapes = dict(mandatory(model_configs.resolve("wan22_i2v_a14b-original")))
    del shapes[TELLING]
    assert best(shapes) == ["wan21_t2v_14b-original", "wan22_i2v_a14b-original"]


@pytest.mark.parametrize(("name", "layout"), [(n, layout) for n in SMALL for layout in family(n).layouts])
def test_any_other_size_is_read_off_a_file(name: str, layout: str) -> None:
    config = small(name, layout)
    expected = config.identifier
    if (name, layout) == ("pixart", "diffusers"):  # it keeps neither of these sizes: they are those that people know
        expected = expected.replace("tokens20_positions16", "tokens300_positions4096")
    assert best({key: m.shape or () for key, m in config.keys().items()}) == [expected]
    assert model_configs.resolve(config.identifier) is config


@pytest.mark.parametrize(
    ("name", "layout"), [(n, layout) for n in SMALL for layout in family(n).layouts if layout != "original"]
)
def test_there_and_back_again(name: str, layout: str) -> None:
    lost = SMALL[name][1] if layout == "diffusers" else ()
    check_there_and_back(small(name, "original"), small(name, layout), lost)


def test_keys_and_values_that_heads_share_are_taken_apart() -> None:
    config = small("lumina2", "original")
    state = tensors(config)
    there = converted(state, config, small("lumina2", "diffusers"))
    rows = state["layers.1.attention.qkv.weight"]
    for part, start, stop in (("q", 0, 16), ("k", 16, 24), ("v", 24, 32)):
        assert torch.equal(there[f"layers.1.attn.to_{part}.weight"], rows[start:stop]), part


@pytest.mark.parametrize("name", SMALL)
def test_files_of_a_size_without_a_name_are_merged(name: str, tmp_path: Path) -> None:
    config = small(name, "comfyui")
    states = [tensors(config, seed) for seed in (1, 2)]
    models = []
    for index, state in enumerate(states):
        save_file(state, tmp_path / f"{index}.safetensors")
        models.append(sd_mecha.model(str(tmp_path / f"{index}.safetensors")))
    output = tmp_path / "merged.safetensors"
    sd_mecha.merge(sd_mecha.weighted_sum(*models, alpha=0.25), output=output, output_dtype=torch.float32, threads=0)
    merged = load_file(output)
    assert merged.keys() == states[0].keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * states[0][key] + 0.25 * states[1][key], msg=key)


def test_files_of_different_layouts_are_merged_by_converting_one() -> None:
    original, diffusers = small("wan", "original"), small("wan", "diffusers")
    first, second = tensors(original, 1), tensors(original, 2)
    one = sd_mecha.model(first)
    other = sd_mecha.convert(sd_mecha.model(converted(second, original, diffusers)), one)
    merged = sd_mecha.merge(sd_mecha.weighted_sum(one, other, alpha=0.5), output_dtype=torch.float32, threads=0)
    key = "blocks.1.cross_attn.k_img.weight"
    torch.testing.assert_close(merged[key], (first[key] + second[key]) / 2)


def test_a_recipe_names_a_size_without_a_name(tmp_path: Path) -> None:
    original, diffusers = small("wan", "original"), small("wan", "diffusers")
    save_file(tensors(diffusers), tmp_path / "wan.safetensors")
    recipe = sd_mecha.convert(sd_mecha.model(str(tmp_path / "wan.safetensors")), original.identifier)
    text = sd_mecha.serialize(recipe)
    assert f"convert_'{diffusers.identifier}'_to_'{original.identifier}'" in text
    assert sd_mecha.serialize(sd_mecha.deserialize(text)) == text
