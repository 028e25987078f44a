"""Stable Diffusion 2, XL and the variants of either; UNets, autoencoders and text encoders as files of their own."""

from __future__ import annotations

import pytest
import torch

import sd_mecha
from sd_mecha.builtin.conversions.parts import CHECKPOINTS
from sd_mecha.errors import ConfigError
from sd_mecha.extensions import model_configs, translations
from sd_mecha.extensions.config_prefix import foreign_prefix
from sd_mecha.storage.contract import TensorEntry
from tests.configs.listings import (
    Listing,
    Shapes,
    best,
    check_there_and_back,
    digest,
    mandatory,
    tensors,
    thinned,
    with_averages,
)

TABLE = """
sd15-unet-ldm sd1-unet 686 9f1c63efcc5060efbb54d591f9e3c8f68aa1b97f72957b212110517e658b5d86
sd15-inpaint-ldm sd1_inpaint-ldm 1131 dfbec478affa964fb06346a3a8a79eb78d34184e1aeff6c103b134bd45821431
sd21-ldm sd2-ldm 1228 2a5635b04d9547ac65fee57e4e9ea2c54ec639e26e483ff2e6a1cfb69496f9b6
sdxl-refiner-sgm sdxl_refiner-sgm 1858 cdc159732008bb8883e801930b609aa1bb868702bdf712e77807559dde0f1b15
sdxl-unet-ldm sdxl-unet 1680 4da7955230b31847dd223fe742676401069cee3b36ffae7ad2933bd01ab2ac20
sdxl-inpaint-unet-ldm sdxl_inpaint-unet 1680 8f20c9d8e5462ffcd40b41280067296b9aa36079f341b30b239c2094e2a3b91d
diffusers-unet-sd15 sd1-diffusers 686 a86ffab7c6f1ad19b0dd78fcf9eaf2a3428748ff87f04561c996e1091a17bf9d
diffusers-unet-sd15-inpaint sd1_inpaint-diffusers 686 28e8258d8d458ad6e063177de67d06e8040ea98102f9d4cf7ebff15421ce34c9
diffusers-unet-sd21 sd2-diffusers 686 b9c711c0f274666554d7f1ec51fa4e5b85bf192686576a1b6fd3c1198d870a27
diffusers-unet-sdxl sdxl-diffusers_unet_only 1680 74f0e72e3fd82f55f08f872c033d9b35ade5289d932e06f985ece9c189f9b7cb
diffusers-unet-sdxl-inpaint sdxl_inpaint-diffusers 1680 3023adabedcfcdcde9db5a598a41024b6e687baff05385a4bc0f8ea25c1523de
diffusers-unet-sdxl-refiner sdxl_refiner-diffusers 1220 d3c1f1a7685fb1e871dc08c0f9ba3fce05a473a8e29091b7c3fafdd01f60ba94
sd-vae-ldm sd_vae-original 248 3f205d47927d415670f61b39b9f4c1ae7b4144e4150ca7f51b1899526092229f
diffusers-vae-sd sd_vae-diffusers 248 0afb81fba3b73b60202b280b4d2850d6bc8a9ce2e04de56b5960181cb619af8f
flux1-ae flux1_vae-original 244 20b923ccc73d52c2da4a0046ffda31e60394c75f67f57fec2a474c3819320fbd
diffusers-vae-16ch-sd3-flux flux1_vae-diffusers 244 90cc8a0edcfa60d2a992be12fea39a24d7c88e15ba9f550344e08b69217d11c9
flux2-vae flux2_vae-original 251 f954daf7d4f7ffdeacf0166f50fd45f5bbfbda9b6a994da6830a618666f9d221
diffusers-vae-flux2 flux2_vae-diffusers 251 1f19ea3af77ef56551c14449f3e1bfcd9770620f94773aca0dcb1e935eed90d5
wan21-vae wan21_vae-original 194 c9ff6f602a116974f2e5be0d25dce12f573d0a851df6464d47286e9e55f3926c
diffusers-vae-wan21 wan21_vae-diffusers 194 e4846f12238ae66790654022a66e7383af12a6ea7e2ec084e39abd5feb5701fd
clip-l-hf-comfyui clip_l-transformers 197 40a258364658aacd774ec499e7d51c596d37c6f3c12649c05a16aaa0a9d06d0d
transformers-clip-l-text clip_l-transformers 196 0346501efc95df8012b73478f02ba6dadeeab4e129be045cf0c202bea79c5f1d
clip-g-hf-comfyui clip_g-transformers 517 e553816021d982ff3fddd7d01faf8ad833b7c8f2771f6784b88ea7769cf6012b
transformers-clip-h-text-sd21 clip_h-transformers 372 582a544c769ccb3e11dec8f451327baf27a8ba2f021d723962990ee2bbcb22d8
t5xxl-comfyui t5xxl-transformers 219 e28a29176ec086e1b224081d33db64220c1fe38c1e71989f875fda4172bbc231
umt5-xxl-comfyui umt5xxl-transformers 242 f4a6cdecc1cb290b8f0dab51043223a63e09ba267d06e52734522aebb557d881
"""
ALIKE = {
    # listings of the same keys and shapes
    "diffusers-vae-qwen-image": "diffusers-vae-wan21",
    "transformers-clip-l-text-proj": "clip-l-hf-comfyui",
    "transformers-clip-bigg-text-proj": "clip-g-hf-comfyui",
    "transformers-t5xxl-encoder": "t5xxl-comfyui",
    "transformers-umt5xxl-encoder": "umt5-xxl-comfyui",
}
LISTINGS = [Listing(row[0], row[1], int(row[2]), row[3]) for row in map(str.split, TABLE.strip().splitlines())]
OPTIONAL = {
    # keys that files of a listing have, and others of the config may lack
    "sd15-inpaint-ldm": ["cond_stage_model.transformer.text_model.embeddings.position_ids"],
    "clip-l-hf-comfyui": ["text_projection.weight"],
    "clip-g-hf-comfyui": ["text_projection.weight"],
}
OTHERS = (
    "sd1_pix2pix-ldm",
    "sd1_pix2pix-unet",
    "sd2-unet",
    "sd2_inpaint-ldm",
    "sd2_depth-ldm",
    "sdxl_inpaint-sgm",
    "sdxl_pix2pix-sgm",
    "sdxl_refiner-unet",
)
"""Configs that are in no listing."""
TELLING = ("input_blocks.0.0.weight", "conv_in.weight")
"""What alone tells the variants with other inputs apart."""

SMALL = {
    "sd": ("inputs5_base8_context6_labels0_linear0", "unet", ("ldm", "diffusers"), "diffuser"),
    "sdxl": ("inputs4_base4_context6_labels10_linear1", "unet", ("sgm", "diffusers"), "diffuser"),
    "sdxlrefiner": ("inputs4_base4_context6_labels10_linear1", "unet", ("sgm", "diffusers"), "diffuser"),
    "autoencoder": ("latent2_base4_quantized1_normed1", "original", ("diffusers",), "vae"),
    "videoautoencoder": ("latent2_base4", "original", ("diffusers",), "vae"),
}
"""A size without name: its hyper-parameters, the layout that rules start from, the others, and the component."""


def shapes_of(listing: Listing) -> dict[str, tuple[int, ...]]:
    config = model_configs.resolve(listing.config)
    return mandatory(config) | {key: config.keys()[key].shape or () for key in OPTIONAL.get(listing.name, ())}


def check_inference(shapes: Shapes, identifier: str) -> None:
    assert best(shapes) == [identifier]
    telling = [key for key in shapes if key.endswith(TELLING)]
    assert best(with_averages(shapes)) == [identifier]
    for seed in range(3):
        few = thinned(shapes, seed, keep=telling)
        assert best(few) == [identifier]
        assert best(with_averages(few)) == [identifier]


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.name)
def test_keys_and_shapes(listing: Listing) -> None:
    shapes = shapes_of(listing)
    assert (len(shapes), digest(shapes)) == (listing.keys, listing.digest)


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.name)
def test_inference(listing: Listing) -> None:
    check_inference(shapes_of(listing), listing.config)


@pytest.mark.parametrize("identifier", [*OTHERS, "sd1-ldm", "sdxl-sgm", "sd1-kohya", "sdxl-kohya"])
def test_inference_of_others(identifier: str) -> None:
    check_inference(mandatory(model_configs.resolve(identifier)), identifier)


def test_the_averages_of_stable_diffusion_are_known() -> None:
    for identifier in ("sd1-ldm", "sd1_inpaint-ldm", "sd2-ldm"):
        config = model_configs.resolve(identifier)
        averages = {k: m.shape or () for k, m in config.components()["ema"].keys().items()}
        assert best(mandatory(config) | averages) == [identifier]


@pytest.mark.parametrize("identifier", ["sd2-ldm", "sdxl-unet", "sd_vae-diffusers", "clip_l-transformers", "sdxl-sgm"])
def test_a_foreign_prefix_is_taken_off_as_a_whole(identifier: str) -> None:
    shapes = mandatory(model_configs.resolve(identifier))
    entries = {key: TensorEntry(shape, torch.float16) for key, shape in shapes.items()}
    assert foreign_prefix(entries) == ""
    assert foreign_prefix({f"module.{key}": entry for key, entry in entries.items()}) == "module."
    odd = {f"module.odd{i}": TensorEntry((1,), torch.float16) for i in range(20)}
    assert foreign_prefix({f"module.{key}": entry for key, entry in entries.items()} | odd) == "module."


def test_a_merge_reads_keys_below_a_foreign_prefix() -> None:
    identifier = "autoencoder.latent2_base4_quantized1_normed1-{}"
    source, target = (model_configs.resolve(identifier.format(layout)) for layout in ("original", "diffusers"))
    state = tensors(source)
    below = {f"module.{key}": tensor for key, tensor in state.items()}
    recipe = sd_mecha.convert(sd_mecha.model(below), target.identifier)
    result = sd_mecha.merge(recipe, merge_dtype=None, output_dtype=None)
    assert target.keys().keys() <= result.keys()
    assert torch.equal(result["bn.num_batches_tracked"], state["bn.num_batches_tracked"])
    assert torch.equal(result["encoder.conv_norm_out.bias"], state["encoder.norm_out.bias"])


@pytest.mark.parametrize("family", SMALL)
def test_a_size_without_name(family: str) -> None:
    size, start, others, component = SMALL[family]
    for layout in (start, *others):
        identifier = f"{family}.{size}-{layout}"
        keys = model_configs.resolve(identifier).components()[component].keys()
        assert best({key: m.shape or () for key, m in keys.items()}) == [identifier]


@pytest.mark.parametrize("family", SMALL)
def test_there_and_back(family: str) -> None:
    size, start, others, component = SMALL[family]
    source = model_configs.resolve(f"{family}.{size}-{start}")
    averages = [key for key in source.keys() if key.startswith("model_ema.")]  # noqa: SIM118 (it is no mapping)
    for layout in others:
        check_there_and_back(source, model_configs.resolve(f"{family}.{size}-{layout}"), averages, component)


def test_counts_of_an_autoencoder_are_integers() -> None:
    for layout in ("original", "diffusers"):
        counted = model_configs.resolve(f"flux2_vae-{layout}").keys()["bn.num_batches_tracked"]
        assert (counted.shape, counted.dtype) == ((), torch.int64)


PARTS = [
    (checkpoint, part)
    for checkpoints in CHECKPOINTS.values()
    for checkpoint in checkpoints
    for part in translations.neighbours(checkpoint)
]


@pytest.mark.parametrize(("checkpoint", "part"), PARTS)
def test_a_part_is_all_there_and_goes_back(checkpoint: str, part: str) -> None:
    whole, alone = model_configs.resolve(checkpoint), model_configs.resolve(part)
    there, back = translations.links_between(whole, alone), translations.links_between(alone, whole)
    assert there is not None
    assert back is not None
    assert mandatory(alone).keys() <= there.keys()
    assert {key: link.shape for key, link in there.items()} == {key: alone.keys()[key].shape for key in there}
    used = {part.key for link in there.values() for part in link.parts}
    assert used == back.keys()  # whatever the part is made of, it gives back
    assert {key: link.shape for key, link in back.items()} == {key: whole.keys()[key].shape for key in back}


def test_parts_are_those_of_the_listings() -> None:
    assert set(translations.neighbours("sd1-ldm")) == {
        "sd_vae-original",
        "sd_vae-diffusers",
        "clip_l-transformers",
        "sd1-unet",
        "sd1-diffusers",
    }
    assert {"clip_l-transformers", "clip_g-transformers", "sdxl-unet"} <= set(translations.neighbours("sdxl-sgm"))
    assert {"clip_h-transformers", "sd2-unet"} <= set(translations.neighbours("sd2-ldm"))
    assert "t5xxl-transformers" in translations.neighbours("sd3-comfyui")


def test_a_text_encoder_of_open_clip_by_the_names_of_transformers() -> None:
    place = "conditioner.embedders.1.model."
    attention = f"{place}transformer.resblocks.3.attn.in_proj_weight"
    projection = f"{place}text_projection"
    state = {attention: torch.randn(3840, 1280), projection: torch.randn(1280, 1280)}
    checkpoint = sd_mecha.model(state, "sdxl-sgm")
    part = sd_mecha.merge(sd_mecha.convert(checkpoint, "clip_g-transformers"), merge_dtype=None, output_dtype=None)
    layer = "text_model.encoder.layers.3.self_attn"
    for number, name in enumerate("qkv"):
        rows = state[attention][number * 1280 : (number + 1) * 1280]
        assert torch.equal(part[f"{layer}.{name}_proj.weight"], rows)
    assert torch.equal(part["text_projection.weight"], state[projection].t())


def test_a_part_is_completed_by_a_checkpoint() -> None:
    query = "first_stage_model.decoder.mid.attn_1.q.weight"
    other = "model.diffusion_model.out.2.bias"
    state = {query: torch.zeros(512, 512, 1, 1), other: torch.ones(4)}
    matrix = torch.randn(512, 512)
    part = sd_mecha.model({"decoder.mid_block.attentions.0.to_q.weight": matrix}, "sd_vae-diffusers")
    recipe = sd_mecha.convert(part, "sdxl-sgm") | sd_mecha.model(state, "sdxl-sgm")
    result = sd_mecha.merge(recipe, merge_dtype=None, output_dtype=None)
    assert torch.equal(result[query], matrix[:, :, None, None])
    assert torch.equal(result[other], state[other])


def test_models_are_not_joined_by_a_part_that_both_have() -> None:
    state = {"model.diffusion_model.out.2.bias": torch.ones(4)}
    for source, target in (("sd1-ldm", "sdxl-sgm"), ("sdxl-sgm", "sd1-ldm"), ("sd1-ldm", "clip_g-transformers")):
        with pytest.raises(ConfigError, match="no conversion leads from"):
            sd_mecha.convert(sd_mecha.model(state, source), target)
    vae = {"quant_conv.bias": torch.ones(8)}
    with pytest.raises(ConfigError, match="no conversion leads from"):
        sd_mecha.convert(sd_mecha.model(vae, "sd_vae-original"), "clip_l-transformers")


def test_block_weights_are_still_known() -> None:
    def first(names: list[str]) -> str:
        fits = model_configs.fits(dict.fromkeys(names))
        return min(fits, key=lambda config: fits[config]).identifier

    for identifier in ("sd1-supermerger_blocks", "sdxl-supermerger_blocks"):
        config = model_configs.resolve(identifier)
        assert first(list(config.keys())) == identifier
        for name in config.keys():  # noqa: SIM118 (it is no mapping)
            assert config in model_configs.fits({name: None})
    assert first(["IN11", "OUT00"]) == "sd1-supermerger_blocks"
    assert first(["VAE", "BASE"]) == "sdxl-supermerger_blocks"
