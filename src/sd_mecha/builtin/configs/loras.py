"""LoRA files of kohya-ss and LyCORIS, as far as they hold LoRA or LoKr factors.

Each derives from the config of the layout whose names it refers to: a tensor `unet.conv_in.weight` there may have
factors `lora_unet_conv_in.lora_up.weight` and so on here. The table of factors is the same for all.
"""

from __future__ import annotations

from functools import partial

import torch

from sd_mecha.builtin.layers.components import Keys
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import BuiltModelConfig, KeyMetadata, ModelConfig, register_aux

PREFIXES = {"kohya_lora": "lora_", "lycoris_lora": "lycoris_"}
"""Kind of file, as it ends the identifier of the config -> what the name of each of its modules begins with."""

BASES = ("sd1-kohya", "sdxl-kohya", "sdxl-kohya_but_diffusers")
"""The configs whose modules such files name."""

LORA_FACTORS = ("lora_up.weight", "lora_mid.weight", "lora_down.weight")
LOKR_FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def modules(base: ModelConfig, prefix: str) -> dict[str, str]:
    """Return the keys of a base config that may be adapted, the matrices and kernels, each with its module's name.

    Args:
        base: the config.
        prefix: what the name of each module begins with.
    """
    return {
        key: prefix + key.removesuffix(".weight").replace(".", "_")
        for key, metadata in base.keys().items()
        if key.endswith(".weight") and metadata.shape is not None and len(metadata.shape) >= 2
    }


def lora_components(base_identifier: str, prefix: str) -> dict[str, Keys]:
    """Return the components of the files that adapt a base config."""
    base = model_configs.resolve(base_identifier)
    names = modules(base, prefix)
    return {
        part: {
            f"{names[key]}.{factor}": entry
            for key, metadata in component.keys().items()
            if key in names
            for factor, entry in _factors(metadata.dtype).items()
        }
        for part, component in base.components().items()
    }


def _factors(dtype: torch.dtype | None) -> Keys:
    tensor = KeyMetadata(None, dtype, optional=True)
    scalar = KeyMetadata((), dtype, optional=True)
    return dict.fromkeys(LORA_FACTORS, tensor) | {"alpha": scalar} | dict.fromkeys(LOKR_FACTORS, tensor)


def _signs(signs: tuple[str, ...], prefix: str) -> tuple[str, ...]:
    """What the names of the modules start with, by what those of the base config start with."""
    return tuple(prefix + sign.rstrip(".").replace(".", "_") for sign in signs)


for _base in BASES:
    for _kind, _prefix in PREFIXES.items():
        _of_base = model_configs.resolve(_base)
        assert isinstance(_of_base, BuiltModelConfig)
        _built = partial(lora_components, _base, _prefix)
        register_aux(BuiltModelConfig(f"{_base}_{_kind}", _built, _signs(_of_base.signs, _prefix)))
