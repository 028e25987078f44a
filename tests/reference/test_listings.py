"""The built-in configs and key maps, key by key, against the full reference data; run by `make reference`."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_mecha.extensions import merge_methods, model_configs

FOLDER = os.environ.get("SD_MECHA_REFERENCE")
LISTINGS = Path(FOLDER or ".") / "golden" / "configs"

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(FOLDER is None, reason="the reference data are not here"),
]


def listing(name: str) -> dict[str, Any]:
    with gzip.open(LISTINGS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", model_configs.get_all(), ids=lambda config: config.identifier)
def test_config(config: model_configs.ModelConfig) -> None:
    expected = listing(config.identifier)["components"]
    assert list(config.components()) == list(expected)
    for name, component in config.components().items():
        assert list(component.keys()) == list(expected[name])
        for key, metadata in component.keys().items():
            wanted = expected[name][key]
            assert (None if metadata.shape is None else list(metadata.shape)) == wanted.get("shape"), key
            assert metadata.dtype == (None if wanted.get("dtype") is None else getattr(torch, wanted["dtype"])), key
            assert list(metadata.aliases) == wanted.get("aliases", []), key
            assert metadata.optional == wanted.get("optional", False), key


def test_block_weights_reach_the_keys_that_they_reached_before() -> None:
    method = merge_methods.resolve("convert_sd1_blocks_to_ldm")
    source, target = model_configs.resolve("sd1-supermerger_blocks"), model_configs.resolve("sd1-ldm")
    key_map = method.build_key_map({"blocks": source}, target)
    assert key_map is not None
    expected = {
        key: [alternative["inputs"] for alternative in relation["alternatives"]]
        for relation in listing("map__convert_sd1_blocks_to_ldm")["relations"]
        for key in relation["outputs"]
    }
    found = {
        key: [{param: list(keys) for param, keys in clause.by_param.items()} for clause in relation.clauses]
        for key, relation in key_map.items()
    }
    assert found == expected
