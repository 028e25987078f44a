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
from tests.configs import golden_cases

FOLDER = os.environ.get("SD_MECHA_REFERENCE")
LISTINGS = Path(FOLDER or ".") / "golden" / "configs"

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(FOLDER is None, reason="the reference data are not here"),
]


def listing(name: str) -> dict[str, Any]:
    with gzip.open(LISTINGS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)  # type: ignore[no-any-return]


PLAIN = [config for config in model_configs.get_all() if not isinstance(config, model_configs.FamilyConfig)]


@pytest.mark.parametrize("config", PLAIN, ids=lambda config: config.identifier)
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


# 1.1.8 forgot the norms in front of the autoencoder's attention, without which a checkpoint is not whole
FORGOTTEN = {
    f"first_stage_model.{half}.mid.attn_1.norm.{name}": f"vae.{half}.mid_block.attentions.0.group_norm.{name}"
    for half in ("decoder", "encoder")
    for name in ("bias", "weight")
}
MORE: dict[str, dict[str, list[dict[str, list[str]]]]] = {
    "convert_'sd1-kohya'_to_'sd1-ldm'": {ldm: [{"kohya_sd": [kohya]}] for ldm, kohya in FORGOTTEN.items()},
    "convert_'sd1-ldm'_to_'sd1-kohya'": {kohya: [{"ldm_sd": [ldm]}] for ldm, kohya in FORGOTTEN.items()},
}


def maps() -> list[str]:
    """The key maps between configs; that of a single value fits any config, and is shown for one only."""
    found = sorted(path.name.removesuffix(".json.gz") for path in LISTINGS.glob("map__*"))
    kinds = ("map__convert_", "map__extract_lora_")
    return [name for name in found if name.startswith(kinds) and name != "map__convert_singleton"]


@pytest.mark.parametrize("name", maps())
def test_methods_read_the_keys_that_they_read_before(name: str) -> None:
    known = listing(name)
    method = merge_methods.resolve(known["method"])
    assert method.is_conversion == known["is_conversion"]
    source, target = model_configs.resolve(known["source"]), model_configs.resolve(known["target"])
    key_map = method.build_key_map(dict.fromkeys(method.get_param_names().args, source), target)
    assert key_map is not None
    expected = {
        tuple(relation["outputs"]): [alternative["inputs"] for alternative in relation["alternatives"]]
        for relation in known["relations"]
    }
    expected |= {(key,): needs for key, needs in MORE.get(method.identifier, {}).items()}
    found = {
        relation.outputs: [
            {param: list(keys) for param, keys in clause.by_param.items()} for clause in relation.clauses
        ]
        for relation in key_map.relations
    }
    assert found == expected


@pytest.mark.parametrize("case", golden_cases.cases(LISTINGS / "conversion_cases"))
def test_conversion(case: dict[str, Any]) -> None:
    golden_cases.check_conversion(case, LISTINGS / "conversion_cases")


LORA_CASES = [
    case
    for case in golden_cases.cases(LISTINGS / "lora")
    # other kinds of adapters have no conversion of this kind
    if "adapter kind not supported" not in case.values[0].get("known_bug", "")
]


@pytest.mark.parametrize("case", LORA_CASES)
def test_lora(case: dict[str, Any]) -> None:
    golden_cases.check_lora(case, LISTINGS / "lora")
