"""Adapters as PEFT saves them: a folder with factors and a configuration."""

from __future__ import annotations

from sd_mecha.extensions.model_formats import LocationFormat, open_model, register_model_format
from sd_mecha.storage.contract import Reader
from sd_mecha.storage.locations import Location
from sd_mecha.storage.peft import PeftReader, find_adapter


@register_model_format
class PeftFormat(LocationFormat):
    """A folder with `adapter_model` and `adapter_config.json`, or that file of factors with the other beside it."""

    identifier = "peft"

    def recognises(self, location: Location) -> bool:
        return find_adapter(location) is not None

    def open(self, location: Location) -> Reader:
        found = find_adapter(location)
        assert found is not None  # it was recognised
        weights, config = found
        return PeftReader(open_model(weights, without=self.identifier), config)
