"""The UNet of Stable Diffusion, from the original layout to that of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sd_mecha.builtin.layers.diffusers_names import unet_name
from sd_mecha.extensions.layouts import Rule, rename

# within transformers over the pixels of a feature map both layouts have the same names
_INSIDE = re.compile(r"\.(?:norm|proj_in|proj_out|transformer_blocks)(?:\..*)?$")


def unet(keys: Iterable[str], labels: str = "add_embedding") -> list[Rule]:
    """The rules for the modules that have these keys.

    Args:
        keys: those of the original layout.
        labels: what diffusers calls the layers that further conditions go through.

    >>> [rule.targets for rule in unet(["input_blocks.4.1.norm.bias", "input_blocks.4.1.proj_in.bias", "out.2.bias"])]
    [('down_blocks.1.attentions.0',), ('conv_out',)]
    """
    modules = dict.fromkeys(_INSIDE.sub("", key.rpartition(".")[0]) for key in keys)
    names = {module: unet_name(f"{module}.weight").removesuffix(".weight") for module in modules}
    return [rename(module, name.replace("add_embedding", labels)) for module, name in names.items()]
