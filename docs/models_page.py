"""The text of docs/models.md: which model files are understood, from the registered configs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from sd_mecha.extensions import merge_methods, model_configs
from sd_mecha.extensions.blocks import blocks_of
from sd_mecha.extensions.model_configs import FamilyConfig, ModelConfig

PAGE = Path(__file__).parent / "models.md"

INTRODUCTION = """\
# Which model files are understood

<!-- Generated from the registered model configs by `make docs`. Edit those. -->

Any PyTorch state dict can be merged with others that have its keys. The files below are recognised by the keys and
shapes in their header, also when some keys are missing, when others are added (such as averages of training), and when
a wrapper put a prefix before all names. They can be converted, merged by component or by block, and take adapters.

A *config* is an architecture in the layout of one program: `sd_mecha.model(path)` finds it, `sd_mecha.model(path,
config="...")` names it, and `sd_mecha.convert(recipe, "...")` leads from one to another, over several steps if need be.
`sd-mecha info FILE` tells what a file is taken for; `sd-mecha info CONFIG --blocks` lists the blocks that
[block weights](block-weights.md) can name.

Sizes are those of published models. Another size of the same network is recognised as well, by a name that states its
hyper-parameters. A state dict of an unknown architecture stays *structural*: it merges by its own keys, and its blocks
are found from numbered groups of keys.

`original` is the layout that the authors published, `comfyui` the same below a prefix and possibly with other
components in one file, `diffusers` that of the diffusers library."""

ADAPTERS = """\
## Adapters and block weights

Configs of LoRA files and of block weights derive from others. For adapters in general see [adapters](adapters.md)."""


def page() -> str:
    """The whole page."""
    return "\n\n".join(_blocks()) + "\n"


def _blocks() -> Iterator[str]:
    aux = {config.identifier for config in model_configs.get_all_aux()}
    weights = {c.identifier for c in model_configs.get_all() if set(c.components()) == {"blocks"}}
    configs = [c for c in model_configs.get_all() if c.identifier not in aux | weights | {"singleton-mecha"}]
    yield INTRODUCTION
    yield "## Models"
    yield "\n".join(_table(sorted(configs, key=lambda c: (_architecture(c), c.identifier))))
    yield ADAPTERS
    yield "\n".join(_derived(c for c in model_configs.get_all() if c.identifier in aux | weights))


def _architecture(config: ModelConfig) -> str:
    return config.family.name if isinstance(config, FamilyConfig) else config.get_architecture_identifier()


def _table(configs: Iterable[ModelConfig]) -> Iterator[str]:
    yield "| config | components (keys) | parameters | blocks | converts to |"
    yield "|-|-|-|-|-|"
    for config in configs:
        parts = ", ".join(f"{name} ({len(part.keys())})" for name, part in config.components().items())
        targets = dict.fromkeys(target for target, _ in merge_methods.get_conversions_from(config.identifier))
        to = ", ".join(f"`{target}`" for target in targets) or "-"
        yield f"| `{config.identifier}` | {parts} | {_parameters(config)} | {len(blocks_of(config))} | {to} |"


def _parameters(config: ModelConfig) -> str:
    total = sum(math.prod(m.shape or ()) for m in config.keys().values() if not m.optional)
    return f"{total / 1e9:.2f} B" if total >= 1e9 else f"{total / 1e6:.0f} M"


def _derived(configs: Iterable[ModelConfig]) -> Iterator[str]:
    yield "| config | keys | converts to |"
    yield "|-|-|-|"
    for config in configs:
        targets = dict.fromkeys(target for target, _ in merge_methods.get_conversions_from(config.identifier))
        to = ", ".join(f"`{target}`" for target in targets) or "-"
        yield f"| `{config.identifier}` | {len(config.keys())} | {to} |"
