"""How programs name the modules of an adapter: whose layout's names they use, what stands before them, and endings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sd_mecha.builtin import adapters as kinds
from sd_mecha.errors import ParameterError
from sd_mecha.extensions.adapter_links import layouts_of
from sd_mecha.extensions.adapter_names import flat
from sd_mecha.extensions.model_configs import FamilyConfig, ModelConfig

_BEFORE = re.compile(
    r"(?:model\.diffusion_model|unet|te\d?|cond_stage_model\.transformer|text_encoders\.\w+\.transformer)\."
)
_MOST = 0.9
_ENCODERS = ("clip_l", "clip_g", "t5xxl")


@dataclass(frozen=True)
class Style:
    """The names that a family of programs writes.

    Attributes:
        name: of the style.
        endings: the style of endings that it writes, as adapter kinds call it.
        layouts: of these, by the second half of its identifier, the first that the model can be converted to is
            the one whose names are used; the model's own where there is none.
        dotted: whether names keep their dots.
        alphas: whether each module says its strength; otherwise readers take it as it is.
        diffs: whether there are names for changes of biases and norms.
    """

    name: str
    endings: str
    layouts: tuple[str, ...]
    dotted: bool = True
    alphas: bool = False
    diffs: bool = False

    def layout(self, config: ModelConfig) -> ModelConfig:
        """The config whose names are used for adapters of models of a config."""
        component = config.components().get("diffuser")
        network = set() if component is None else set(component.keys())
        found: dict[str, ModelConfig] = {}
        for there, links in layouts_of(config):
            # conversions also lead to parts of the model, and through these to models that share them
            covered = {part.key for link in links.values() for part in link.parts} & network
            if network and len(covered) >= _MOST * len(network):
                found.setdefault(there.get_implementation_identifier(), there)
        return next((found[name] for name in self.layouts if name in found), config)

    def module(self, config: ModelConfig, component: str, name: str) -> str | None:
        """What the module is called in a file; None where the style has no name for parts of that component.

        Args:
            config: whose names the module's is one of.
            component: that the module is of.
            name: of the module in models of that config.
        """
        before = self._before(config, component)
        if before is None:
            return None
        own = config.family.layouts[config.layout].prefix if isinstance(config, FamilyConfig) else ""
        if component == "diffuser" and own and name.startswith(own):
            name = name.removeprefix(own)
        else:
            name = _BEFORE.sub("", name, count=1) if _BEFORE.match(name) else name
        return f"{before}.{name}" if self.dotted else flat(f"{before}.{name}")

    def _before(self, config: ModelConfig, component: str) -> str | None:
        known = config.identifier != "structural"
        if self.name == "peft":
            return "base_model.model" if not known or component == "diffuser" else None
        if not known or component == "diffuser":
            unet = config.get_architecture_identifier() in ("sd1", "sdxl")
            return {"kohya": "lora_unet", "comfyui": "diffusion_model"}.get(
                self.name, "unet" if unet else "transformer"
            )
        if component not in _ENCODERS:
            return None
        number = _ENCODERS.index(component) + 1
        if self.name == "comfyui":
            return f"text_encoders.{component}.transformer"
        if self.name == "kohya":
            return "lora_te" if config.get_architecture_identifier() == "sd1" else f"lora_te{number}"
        if component == "t5xxl" and "clip_g" not in config.components():
            number = 2
        return "text_encoder" if number == 1 else f"text_encoder_{number}"


STYLES: Mapping[str, Style] = {
    style.name: style
    for style in (
        Style("kohya", "kohya", ("kohya", "original", "flux", "comfyui"), dotted=False, alphas=True, diffs=True),
        Style("comfyui", "kohya", ("ldm", "kohya", "original", "flux"), alphas=True, diffs=True),
        Style("diffusers", "peft", ("kohya_but_diffusers", "kohya", "diffusers", "original")),
        Style("peft", "peft", ("kohya_but_diffusers", "kohya", "diffusers", "original")),
    )
}


def style_of(caller: str, name: str) -> Style:
    """The style of that name.

    Raises:
        ParameterError: there is none.
    """
    if name not in STYLES:
        raise ParameterError(f"{caller}: style is {name!r}; expected {' or '.join(map(repr, STYLES))}")
    return STYLES[name]


def lora_keys(module: str, endings: str) -> dict[str, str]:
    """Part -> key of the two factors of a LoRA.

    Args:
        endings: the style of the endings.
    """
    return {part: f"{module}.{kinds.lora.LORA.ending(part, endings)}" for part in ("up", "down")}
