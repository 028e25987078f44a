"""Flux, Chroma, HunyuanVideo, AuraFlow and Stable Diffusion 3: their listings, inference and conversions."""

from __future__ import annotations

import pytest
import torch

from sd_mecha.extensions import model_configs, translations
from sd_mecha.extensions.model_configs import ModelConfig
from tests.configs.listings import Listing, Shapes, best, converted, digest, mandatory, tensors, thinned, with_averages

LISTINGS = [
    Listing("flux2-dev", "flux2_dev-original", 299, "4ab8ed146ca59f26dce648ff2d23f6ebad7a3b72b3f5a5adcc50157297a6bd77"),
    Listing(
        "diffusers-flux2-dev",
        "flux2_dev-diffusers",
        331,
        "cba2eea52bbda40e3c708b1291d8d33f3d264247749c5b8489f5d1745b82d1b6",
    ),
    Listing(
        "flux2-klein-4b",
        "flux2_klein_4b-original",
        149,
        "93d7f9d07be0933a37611b2646416c4e68a829ddf0fb5f94cf5a7a14ef4c1a4a",
    ),
    Listing(
        "diffusers-flux2-klein-4b",
        "flux2_klein_4b-diffusers",
        169,
        "050475c5e4a502288ad35abb3b23f282bd1b7a22da1f644b3d76e2d086772cce",
    ),
    Listing(
        "flux2-klein-9b",
        "flux2_klein_9b-original",
        201,
        "58ac3fd9f789f8ca7d4ac8e800a47ff7927a57fcc1a7f3207f65abaf02ef1c3c",
    ),
    Listing(
        "diffusers-flux2-klein-9b",
        "flux2_klein_9b-diffusers",
        233,
        "742435a9a772ad3d32bac38ca22715fa1d5f5c09815b4b298ca7ac1e2e5bb29b",
    ),
    Listing(
        "flux1-schnell",
        "flux1_schnell-original",
        776,
        "a716f79fdf50094b067cb088ae108224aa78a1fbb80761c5d4f629e15a33fff3",
    ),
    Listing(
        "diffusers-flux1-schnell",
        "flux1_schnell-diffusers",
        1156,
        "37d4c25c9fecbd0843b1811ff1f678e00b8a90182e23eefc1d6b46a0ec8035bb",
    ),
    Listing("chroma1", "chroma1-original", 643, "9938b0be4849dd60a4c429cc6f70726a2c36794a4559dc7ef106b9055e422907"),
    Listing(
        "diffusers-chroma1",
        "chroma1-diffusers",
        1023,
        "35c4c4747eb0bea4fbccb580953787f9ed5b5ad272ac6e670ef9cd0acc6d33e0",
    ),
    Listing(
        "auraflow-v0.3",
        "auraflow_v0.3-comfyui",
        331,
        "3c8b6501a4508ecd4862950b7a64dba143d36f801707e22dc0fe39233b2faf37",
    ),
    Listing(
        "diffusers-auraflow-v0.3",
        "auraflow_v0.3-diffusers",
        331,
        "3ae594a8b1261b8d1a3fdcd7dc5341d1fb65f8845aa861715a8502a354e7de7b",
    ),
    Listing(
        "sd3-medium-mmdit",
        "sd3_medium-original",
        491,
        "2aeb23ddd6d64dce3c85a3d2029a1fd0176e2ef71eaa617fd1fb64e4650b8eb0",
    ),
    Listing(
        "diffusers-sd3-medium",
        "sd3_medium-diffusers",
        683,
        "43508a189bfb5e4ea76fb83981e71a8625ca87d24d02cfefce2e4f82b64f48b2",
    ),
    Listing(
        "sd35-medium-mmdit",
        "sd35_medium-original",
        665,
        "3d9f2fb0941f927010a5d655a880a6b38f296599d2aca6c0ffac92c389bede40",
    ),
    Listing(
        "sd35-medium-comfyui",
        "sd35_medium-comfyui",
        909,
        "6f40e3cd3d70c0f2a5825a2996481c157cd0824875c0a01daf88c2dac615b502",
    ),
    Listing(
        "diffusers-sd35-medium",
        "sd35_medium-diffusers",
        909,
        "51c7b1803d907676c6359ec9bbe147edb4f32bb19d137db3a07cbd89cc6b2d0c",
    ),
    Listing(
        "sd35-large-mmdit",
        "sd35_large-original",
        923,
        "09143e3b42e177fdc6f5e7019c4c8d45ac5d73308f2262272b6651d99362b606",
    ),
    Listing(
        "sd35-large-comfyui",
        "sd35_large-comfyui",
        1167,
        "baf4ad2e95ab70802169cd098bddc95278459d2b276ef426c2dd2f023f1c4a90",
    ),
    Listing(
        "diffusers-sd35-large",
        "sd35_large-diffusers",
        1227,
        "01c48f78a3066a70906c6cd25d12f53a2108d7344de65a2f1eeb41c4426708c9",
    ),
    Listing(
        "flux1-fill-dev",
        "flux1_fill_dev-original",
        780,
        "82e1e74526ce4cab64308fdc27679b1db03fdbf567d0935708c42ea1cf784b35",
    ),
    Listing(
        "diffusers-flux1-dev",
        "flux1_dev-diffusers",
        1160,
        "446a22ef58be11b9fdde2bd2f586f3d83acdd813955bdfd7360b484aa8161906",
    ),
    Listing(
        "hunyuan-video-original",
        "hunyuan_video-original",
        856,
        "bff4b961d82a67b0a0091b7b740771b3e59418117b991a51e784b2cff3af9019",
    ),
    Listing(
        "hunyuan-video-comfyui",
        "hunyuan_video-comfyui",
        856,
        "554e6721d7e241c5e033fc6b7e2920fd4eb0adb656c207f20202d0d299315812",
    ),
    Listing(
        "diffusers-hunyuan-video",
        "hunyuan_video-diffusers",
        1264,
        "9536e8fd02c978a9d5cd5315c0de8c8cb5af2c097b15342fa298d8a03f80ceed",
    ),
]
IDENTIFIERS = [listing.config for listing in LISTINGS]

COMFYUI = {
    # identifiers of a network below a prefix, and as it is published
    "flux2_dev": "model.diffusion_model.",
    "flux2_klein_4b": "model.diffusion_model.",
    "flux2_klein_9b": "model.diffusion_model.",
    "flux1_schnell": "model.diffusion_model.",
    "flux1_fill_dev": "model.diffusion_model.",
    "chroma1": "model.diffusion_model.",
    "sd35_medium": "model.diffusion_model.",
    "sd35_large": "model.diffusion_model.",
    "auraflow_v0.3": "model.",
}

SMALL = {
    # a size that has no name
    "flux2": "width8_head4_inner12_double2_single3_channels6_context10_guided1",
    "flux1": "width8_head4_double2_single3_inputs6_outputs4_context10_pooled5_guided1",
    "chroma": "width8_head4_double2_single3_channels6_context10_guide12_layers2_conditions3",
    "hunyuanvideo": "width8_head4_double2_single3_refiner1_latent4_patch2_outputs16_context10_pooled5_guided1",
    "auraflow": "width8_inner12_double2_single3_channels6_context10_positions9_registers2",
    "sd3": "depth3_width8_head4_dual2_latent4_patch2_positions3_context10_pooled5",
}


def network(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The keys of the transformer alone."""
    keys = config.components()["diffuser"].keys()
    return {key: shape for key, shape in mandatory(config).items() if key in keys}


def check_inference(shapes: Shapes, identifier: str) -> None:
    assert best(shapes) == [identifier]
    telling = [key for key in shapes if key.endswith("img_in.weight")]  # dev and fill differ in it alone
    for seed in range(5):
        assert best(with_averages(thinned(shapes, seed, keep=telling))) == [identifier]


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.name)
def test_keys_and_shapes(listing: Listing) -> None:
    keys = mandatory(model_configs.resolve(listing.config))
    assert (len(keys), digest(keys)) == (listing.keys, listing.digest)


@pytest.mark.parametrize("variant", COMFYUI)
def test_below_a_prefix(variant: str) -> None:
    shapes = mandatory(model_configs.resolve(f"{variant}-original"))
    below = {COMFYUI[variant] + key: shape for key, shape in shapes.items()}
    assert network(model_configs.resolve(f"{variant}-comfyui")) == below
    check_inference(below, f"{variant}-comfyui")


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_inference(identifier: str) -> None:
    check_inference(mandatory(model_configs.resolve(identifier)), identifier)


def test_flux_dev_stays_what_it_was() -> None:
    config = model_configs.resolve("flux-flux")
    below = network(config)
    bare = {key.removeprefix("model.diffusion_model."): shape for key, shape in below.items()}
    for shapes in (bare, below, mandatory(config)):
        check_inference(shapes, "flux-flux")
    del bare["img_in.weight"]
    assert best(bare) == ["flux-flux", "flux1_fill_dev-original"]


def test_stable_diffusion_3_medium_stays_what_it_was() -> None:
    config = model_configs.resolve("sd3-comfyui")
    shapes = mandatory(config)
    published = {k: s for k, s in shapes.items() if k.startswith(("model.diffusion_model.", "first_stage_model."))}
    for found in (shapes, published):
        check_inference(found, "sd3-comfyui")


@pytest.mark.parametrize(
    ("source", "target"), [("flux-flux", "flux1_dev-diffusers"), ("sd3-comfyui", "sd3_medium-original")]
)
def test_configs_outside_of_a_family_are_linked_to_it(source: str, target: str) -> None:
    start, end = model_configs.resolve(source), model_configs.resolve(target)
    there, back = translations.links_between(start, end), translations.links_between(end, start)
    assert there is not None
    assert back is not None
    assert there.keys() == end.keys().keys()
    assert back.keys() == {k for k in network(start) if k.startswith("model.diffusion_model.")}
    assert target in translations.neighbours(source)


@pytest.mark.parametrize("family", SMALL)
def test_a_size_without_name(family: str) -> None:
    layouts = {f.name: list(f.layouts) for f in model_configs.get_all_families()}[family]
    for layout in layouts:
        identifier = f"{family}.{SMALL[family]}-{layout}"
        shapes = network(model_configs.resolve(identifier))
        assert best(shapes) == [identifier]


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_there_and_back(family: str, layout: str) -> None:
    original, other = (model_configs.resolve(f"{family}.{SMALL[family]}-{name}") for name in ("original", layout))
    state = tensors(original)
    there = converted(state, original, other)
    assert {key: tuple(tensor.shape) for key, tensor in there.items()} == network(other)
    back = converted(there, other, original)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_the_last_block_of_stable_diffusion_3() -> None:
    size = SMALL["sd3"]
    start, end = (model_configs.resolve(f"sd3.{size}-{layout}") for layout in ("original", "diffusers"))
    made = translations.links_between(start, end)
    assert made is not None
    rows = {i: [p.start for p in made[f"transformer_blocks.{i}.norm1_context.linear.weight"].parts] for i in range(3)}
    assert rows == {0: [0], 1: [0], 2: [8, 0]}
    norms = {i: (end.keys()[f"transformer_blocks.{i}.norm1.linear.weight"].shape or ())[0] for i in range(3)}
    assert norms == {0: 72, 1: 72, 2: 48}
