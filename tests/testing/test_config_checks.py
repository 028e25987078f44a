"""The conformance checks for model configs pass on sound configs and catch unsound ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from sd_mecha.errors import ContractError
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import KeyMetadata, ModelComponent, ModelConfig, ModelConfigImpl
from sd_mecha.testing import check_model_config


@pytest.mark.parametrize("config", [pytest.param(c, id=c.identifier) for c in model_configs.get_all()])
def test_built_in_configs_conform(config: ModelConfig) -> None:
    check_model_config(config)


def metadata(*aliases: str, **fields: Any) -> KeyMetadata:
    return KeyMetadata(shape=(2, 3), dtype=torch.float16, aliases=aliases, **fields)


class Loose(ModelConfig):
    """A config that checks nothing of what it is given."""

    def __init__(self, identifier: str, keys: Mapping[str, KeyMetadata], **components: Any) -> None:
        self._identifier = identifier
        self._keys = keys
        self._components = {name: ModelComponent(part) for name, part in components.items()}

    @property
    def identifier(self) -> str:
        return self._identifier

    def components(self) -> Mapping[str, ModelComponent]:
        return self._components

    def keys(self) -> Mapping[str, KeyMetadata]:
        return self._keys


def test_a_sound_config_passes() -> None:
    check_model_config(ModelConfigImpl("toy-plain", {"net": {"w": metadata("v.w", optional=True), "b": None}}))
    keys = {"w": metadata("v.w")}
    check_model_config(Loose("toy-plain", keys, net=keys))


W = {"w": metadata()}

UNSOUND = {
    "not of the form": Loose("Toy", W, net=W),
    "'b' is in no component": Loose("toy-plain", {**W, "b": metadata()}, net=W),
    "holds 'b', which keys": Loose("toy-plain", W, net={**W, "b": metadata()}),
    "components 'net' and 'vae'": Loose("toy-plain", W, net=W, vae=W),
    r"'v' belongs to '[wb]' and to": Loose(
        "toy-plain", {"w": metadata("v"), "b": metadata("v")}, net={"w": metadata("v"), "b": metadata("v")}
    ),
    "alias 'b' of 'w' is a key": Loose(
        "toy-plain", {"w": metadata("b"), "b": metadata()}, net={"w": metadata("b"), "b": metadata()}
    ),
    r"has the shape \(-1,\)": Loose("toy-plain", {"w": KeyMetadata((-1,))}, net={"w": KeyMetadata((-1,))}),
    r"differs between keys\(\) and": Loose("toy-plain", W, net={"w": KeyMetadata((9,))}),
}


@pytest.mark.parametrize("message", UNSOUND)
def test_unsound_configs_are_caught(message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_model_config(UNSOUND[message])


def test_an_alias_that_leads_elsewhere_is_caught() -> None:
    class Misled(Loose):
        def resolve_alias(self, key: str) -> str:
            return key

    keys = {"w": metadata("v.w")}
    with pytest.raises(ContractError, match=r"'v\.w' of 'w' resolves to 'v\.w'"):
        check_model_config(Misled("toy-plain", keys, net=keys))
