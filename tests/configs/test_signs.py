"""The starts of keys by which inference decides which of the plain configs to build."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sd_mecha.extensions import model_configs
from sd_mecha.extensions.header import Header
from sd_mecha.extensions.model_configs import BuiltModelConfig

CONFIGS = [config for config in model_configs.get_all() if isinstance(config, BuiltModelConfig)]


def test_all_plain_configs_have_signs() -> None:
    assert len(CONFIGS) >= 16
    assert all(config.signs for config in CONFIGS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.identifier)
def test_every_key_and_every_other_name_of_it_is_a_sign(config: BuiltModelConfig) -> None:
    for key, metadata in config.keys().items():
        for name in (key, *metadata.aliases):
            (start,) = Header({name: None})
            assert start.startswith(config.signs), name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.identifier)
def test_each_component_is_known_alone(config: BuiltModelConfig) -> None:
    for component in config.components().values():
        assert config in model_configs.fits(dict.fromkeys(component.keys()))


BUILT = """
from sd_mecha.extensions import model_configs as mc
mc.fits({name: None for name in %r})
print(*sorted(c.identifier for c in mc.get_all() if isinstance(c, mc.BuiltModelConfig) and c._config is not None))
"""


@pytest.mark.parametrize(
    ("names", "built"),
    [
        (["blocks.0.self_attn.norm_q.weight"], ""),
        (["odd.weight"], ""),
        (["IN00"], "sd1-supermerger_blocks sdxl-supermerger_blocks"),
        (["down_blocks.0.resnets.0.norm1.weight"], "sdxl-diffusers_unet_only"),
        (["model.diffusion_model.double_blocks.0.img_mod.lin.weight"], "flux-flux"),
        (["te.text_model.final_layer_norm.bias"], "sd1-kohya"),
    ],
)
def test_only_what_a_state_dict_may_be_is_built(names: list[str], built: str) -> None:
    program = [sys.executable, "-c", BUILT % names]
    run = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == built
