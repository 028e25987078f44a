"""Checkpoints of Stable Diffusion and parts of checkpoints against the full reference data, and inference of all of it.

Run by `make reference`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sd_mecha.extensions import model_configs
from sd_mecha.extensions.config_prefix import foreign_prefix
from sd_mecha.extensions.layouts import Part
from sd_mecha.storage.contract import TensorEntry
from tests.configs import test_more_families, test_transformers
from tests.configs import test_parts as configs
from tests.configs.listings import Shapes, mandatory, thinned, with_averages
from tests.reference.test_families import FOLDER, KEYS, known, parts

LISTINGS = {listing.name: listing.config for listing in configs.LISTINGS}
LISTINGS |= {name: LISTINGS[other] for name, other in configs.ALIKE.items()}

EVERY = {
    **{listing.name: listing.config for listing in (*test_more_families.LISTINGS, *test_transformers.LISTINGS)},
    **LISTINGS,
    "sd15-ldm": "sd1-ldm",
    "sdxl-base-sgm": "sdxl-sgm",
    "sd3-medium-comfyui": "sd3-comfyui",
    "flux1-dev": "flux-flux",
    "flux1-dev-allinone-comfyui": "flux-flux",
}

MAPS = {
    "diffusers-unet-sd15": ("sd1-ldm", "sd1-diffusers"),
    "diffusers-unet-sd15-inpaint": ("sd1_inpaint-ldm", "sd1_inpaint-diffusers"),
    "diffusers-unet-sd21": ("sd2-ldm", "sd2-diffusers"),
    "diffusers-unet-sdxl": ("sdxl-unet", "sdxl-diffusers_unet_only"),
    "diffusers-unet-sdxl-inpaint": ("sdxl_inpaint-unet", "sdxl_inpaint-diffusers"),
    "diffusers-unet-sdxl-refiner": ("sdxl_refiner-sgm", "sdxl_refiner-diffusers"),
    "diffusers-vae-sd__from_sd15-ldm": ("sd1-ldm", "sd_vae-diffusers"),
    "diffusers-vae-sd__from_sdxl-base-sgm": ("sdxl-sgm", "sd_vae-diffusers"),
    "diffusers-vae-16ch__from_flux1-ae": ("flux1_vae-original", "flux1_vae-diffusers"),
    "diffusers-vae-flux2__from_flux2-vae": ("flux2_vae-original", "flux2_vae-diffusers"),
    "diffusers-vae-wan21": ("wan21_vae-original", "wan21_vae-diffusers"),
    "transformers-clip-l__from_sd15-ldm": ("sd1-ldm", "clip_l-transformers"),
    "transformers-clip-l__from_sdxl-base-sgm": ("sdxl-sgm", "clip_l-transformers"),
    "transformers-clip-h__from_sd21-ldm": ("sd2-ldm", "clip_h-transformers"),
    "transformers-clip-bigg__from_sdxl-base-sgm": ("sdxl-sgm", "clip_g-transformers"),
    "transformers-clip-bigg__from_sdxl-refiner-sgm": ("sdxl_refiner-sgm", "clip_g-transformers"),
    "transformers-t5xxl__from_sd3-comfyui": ("sd3-comfyui", "t5xxl-transformers"),
}
"""The configs that each map leads from and to."""
UNKNOWN = {"text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"}
"""What the config of the checkpoint does not know: embeddings that are there a second time."""
NOT_MAPPED = {
    # what the program that made the maps leaves to others
    "flux2_vae-diffusers": {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"},
}

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(FOLDER is None, reason="the reference data are not here"),
]


def shapes(keys: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in keys.items()}


def entries(keys: Shapes) -> dict[str, TensorEntry]:
    return {key: TensorEntry(shape, torch.bfloat16) for key, shape in keys.items()}


def first(keys: Shapes) -> str:
    fits = model_configs.fits(entries(keys))
    return min(fits.items(), key=lambda item: item[1])[0].identifier


@pytest.mark.parametrize("name", LISTINGS)
def test_keys_and_shapes(name: str) -> None:
    config = model_configs.resolve(LISTINGS[name])
    listing = known(name)
    expected, optional = shapes(listing["keys"]), shapes(listing.get("optional_keys", {}))
    own = {key: metadata.shape for key, metadata in config.keys().items()}
    assert {key: own.get(key) for key in (*expected, *optional)} == expected | optional
    assert mandatory(config).keys() <= expected.keys()


@pytest.mark.parametrize("name", MAPS)
def test_conversion(name: str) -> None:
    source, target = MAPS[name]
    expected = known(f"map_{name}")
    config = model_configs.resolve(source)

    def whole(key: str) -> tuple[Part, ...]:
        # maps of a network name its keys with the prefix that they have in a checkpoint, or without
        key = key if config.find(key) else key.removeprefix("model.diffusion_model.")
        key = config.find(key) or config.find(f"model.diffusion_model.{key}") or key
        return (Part(key, 0, (config.keys()[key].shape or (0,))[0]),)

    made = {there: whole(key) for key, there in expected["one_to_one"].items() if key not in UNKNOWN}
    made |= {piece["to"]: whole(key) for key, piece in expected["transformed_one_to_one"].items()}
    for pieces in expected["split"].values():
        made |= {piece["to"]: tuple(Part(*segment) for segment in piece["dim0_segments"]) for piece in pieces}
    found = parts(source, target)
    assert found.keys() - made.keys() <= NOT_MAPPED.get(target, set())
    assert {key: found.get(key) for key in made} == made


def test_every_listing_is_named() -> None:
    names = {path.name.removesuffix(".json.gz") for path in KEYS.glob("*.json.gz")}
    assert {name for name in names if not name.startswith("map_")} == EVERY.keys()


@pytest.mark.parametrize("name", EVERY)
def test_inference(name: str) -> None:
    keys = shapes(known(name)["keys"])
    assert first(keys) == EVERY[name]
    assert first(with_averages(keys)) == EVERY[name]
    for seed in range(3):
        few = thinned(keys, seed, keep=[key for key in keys if key.endswith(("img_in.weight", *configs.TELLING))])
        assert first(few) == EVERY[name]
        assert first(with_averages(few)) == EVERY[name]


@pytest.mark.parametrize("name", EVERY)
def test_a_foreign_prefix_is_found(name: str) -> None:
    keys = shapes(known(name)["keys"])
    assert foreign_prefix(entries(keys)) == ""
    assert foreign_prefix(entries({f"module.{key}": shape for key, shape in keys.items()})) == "module."
    few = thinned(keys, 0)
    assert foreign_prefix(entries({f"module.{key}": shape for key, shape in few.items()})) == "module."
