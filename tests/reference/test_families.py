"""The keys, shapes and conversions of families of configs against the full reference data; run by `make reference`."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sd_mecha.extensions import model_configs, translations
from sd_mecha.extensions.layouts import Part
from tests.configs import test_more_families, test_transformers
from tests.configs.listings import Listing, best, mandatory, optional

FOLDER = os.environ.get("SD_MECHA_REFERENCE")
KEYS = Path(FOLDER or ".") / "keys"
LISTINGS = [*test_more_families.LISTINGS, *test_transformers.LISTINGS]
ORIGINALS = {listing.name: listing.config for listing in LISTINGS}
ORIGINALS |= {"flux1-dev": "flux-flux", "sd3-medium-comfyui": "sd3-comfyui"}

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(FOLDER is None, reason="the reference data are not here"),
]


def known(name: str) -> dict[str, Any]:
    with gzip.open(KEYS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)  # type: ignore[no-any-return]


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.name)
def test_keys_and_shapes(listing: Listing) -> None:
    config = model_configs.resolve(listing.config)
    expected = known(listing.name)
    assert mandatory(config) == {key: tuple(shape) for key, shape in expected["keys"].items()}
    if "optional_keys" in expected:
        assert optional(config) == {key: tuple(shape) for key, shape in expected["optional_keys"].items()}


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda listing: listing.name)
def test_inference(listing: Listing) -> None:
    keys = {key: tuple(shape) for key, shape in known(listing.name)["keys"].items()}
    assert best(keys) == [listing.config]


MAPPED = [listing for listing in LISTINGS if (KEYS / f"map_{listing.name}.json.gz").is_file()]


@pytest.mark.parametrize("listing", MAPPED, ids=lambda listing: listing.name)
def test_conversion_from_the_original(listing: Listing) -> None:
    expected = known(f"map_{listing.name}")
    name, _, without_prefix = expected["original"].partition(" ")
    source, target = ORIGINALS[name], listing.config
    if without_prefix:
        source = f"{source.rpartition('-')[0]}-original"
    if source == target:  # one layout stands for both
        assert all(here == other for here, other in expected["one_to_one"].items())
        return
    config = model_configs.resolve(source)
    keys = {here: config.find(here) or here for here in [*expected["one_to_one"], *expected["split"]]}
    keys |= {here: config.find(here) or here for here in expected["transformed_one_to_one"]}
    made = {
        other: (Part(keys[here], 0, (config.keys()[keys[here]].shape or (0,))[0]),)
        for here, other in expected["one_to_one"].items()
    }
    for pieces in (*expected["split"].values(), expected["transformed_one_to_one"].values()):
        for piece in pieces:
            made[piece["to"]] = tuple(Part(keys[key], start, stop) for key, start, stop in piece["dim0_segments"])
    assert not expected["merged"]
    assert parts(source, target) == made


def parts(source: str, target: str) -> dict[str, tuple[Part, ...]]:
    """What each key is made of, by way of another layout where no rules lead straight there."""
    start, end = model_configs.resolve(source), model_configs.resolve(target)
    made = translations.links_between(start, end)
    if made is not None:
        return {key: link.parts for key, link in made.items()}
    between = next(name for name in translations.neighbours(source) if target in translations.neighbours(name))
    middle = model_configs.resolve(between)
    first, second = translations.links_between(start, middle), translations.links_between(middle, end)
    assert first is not None
    assert second is not None
    return {
        key: tuple(Part(first[part.key].parts[0].key, part.start, part.stop) for part in link.parts)
        for key, link in second.items()
    }


def test_hunyuan_video_as_comfyui_names_it() -> None:
    links = parts("hunyuan_video-original", "hunyuan_video-comfyui")
    names = {key: link[0].key for key, link in links.items()}
    assert names == {there: here for here, there in known("hunyuan-video-original")["map_to_comfyui"].items()}
