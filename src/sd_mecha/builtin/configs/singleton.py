"""`singleton-mecha`: the config of a single value, which fits every key of whatever config it meets."""

from __future__ import annotations

from sd_mecha.extensions.model_configs import KeyMetadata, ModelConfigImpl, register

register(ModelConfigImpl("singleton-mecha", {"keys": {"key": KeyMetadata()}}))
