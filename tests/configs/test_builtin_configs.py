"""The built-in configs against digests of the listings that they must reproduce."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
import time

import pytest

import sd_mecha.builtin.configs
from sd_mecha.builtin.configs.sd1 import sd1_ldm
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.model_configs import ModelConfig, ModelConfigImpl

DIGESTS: dict[str, tuple[dict[str, int], str, str]] = {
    # identifier: keys per component, SHA-256 of the sorted lines "name shape" and of those with the rest
    "singleton-mecha": (
        {"keys": 1},
        "75c363dd619ba71b553ecfa92a87a9684a910a45f47058e6dca607a68c1c6bd3",
        "d811166e61fdde5b32bed833e34aca8324fa4328aecfe89eea808691698b5d78",
    ),
    "sd1-supermerger_blocks": (
        {"blocks": 26},
        "45a07550f7d21d350a19a160f561d8de01d68500dcf9075eaab60001d82e96f3",
        "c9d9f4af2f69b31dc6256606792c97e593b7bfb46eb24c9186fda46faa6247c2",
    ),
    "sdxl-supermerger_blocks": (
        {"blocks": 21},
        "70db1414a8532b8fc743bcdacbb3facbe92cc3859776f86210767554ae00f651",
        "b11051ce940844e86fa1a2b488e6775896903feb7c1bb9d484ea58f7690b0cf5",
    ),
    "sd1-ldm": (
        {"clip_l": 197, "vae": 248, "diffuser": 686, "ema": 688, "scheduler": 12},
        "82286b5a37f441707a13247d1054fb9ae850c10d7892bac29eba208aa9421dfc",
        "e88afd9096787f8e9b7234fb3fd15ff1e0b79d0d390fa1587c607e247899e73c",
    ),
}


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def shape_lines(config: ModelConfig) -> list[str]:
    return [f"{key} {m.shape if m.shape is None else list(m.shape)}" for key, m in config.keys().items()]


def other_lines(config: ModelConfig) -> list[str]:
    return [f"{key} {m.dtype} {m.optional} {list(m.aliases)}" for key, m in config.keys().items()]


@pytest.mark.parametrize("identifier", DIGESTS)
def test_listing(identifier: str) -> None:
    config = model_configs.resolve(identifier)
    components, shapes, others = DIGESTS[identifier]
    assert {name: len(part.keys()) for name, part in config.components().items()} == components
    assert digest(shape_lines(config)) == shapes
    assert digest(other_lines(config)) == others


def test_spot_checks_of_sd1() -> None:
    config = model_configs.resolve("sd1-ldm")
    keys = config.keys()
    assert keys["model.diffusion_model.output_blocks.5.0.skip_connection.weight"].shape == (1280, 1920, 1, 1)
    assert keys["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape == (
        1280,
        768,
    )
    assert keys["first_stage_model.decoder.up.1.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    old = "cond_stage_model.transformer.embeddings.position_ids"
    assert config.find(old) == "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert config.find("model_ema.time_embed0bias") == "model_ema.diffusion_modeltime_embed0bias"
    assert not any(m.optional for m in config.components()["diffuser"].keys().values())
    assert all(m.optional for m in config.components()["ema"].keys().values())


def test_ema_mirrors_the_diffuser() -> None:
    parts = model_configs.resolve("sd1-ldm").components()
    for key, metadata in parts["diffuser"].keys().items():
        flat = "model_ema." + key.removeprefix("model.").replace(".", "")
        assert parts["ema"].keys()[flat].shape == metadata.shape


def test_block_names() -> None:
    sd1 = list(model_configs.resolve("sd1-supermerger_blocks").keys())
    assert (sd1[0], sd1[1], sd1[12], sd1[13], sd1[-1]) == ("BASE", "IN00", "IN11", "M00", "OUT11")
    assert list(model_configs.resolve("sdxl-supermerger_blocks").keys())[-2:] == ["OUT08", "VAE"]


def test_an_sd1_checkpoint_is_recognised() -> None:
    config = model_configs.resolve("sd1-ldm")
    mandatory = [key for key, metadata in config.keys().items() if not metadata.optional]
    assert model_configs.infer_model_configs(mandatory)[0] == {config}


def test_importing_builds_nothing() -> None:
    code = (
        "from sd_mecha.builtin.configs import sd1\n"
        "from sd_mecha.extensions.model_configs import resolve\n"
        "sd1.unet = lambda **options: 1 / 0\n"
        "try:\n"
        "    resolve('sd1-ldm').keys()\n"
        "except ZeroDivisionError:\n"
        "    raise SystemExit(0)\n"
        "raise SystemExit('the config was built before it was used')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_building_is_fast() -> None:
    def cpu_time() -> float:
        start = time.process_time()
        ModelConfigImpl("sd1-ldm", sd1_ldm())
        return time.process_time() - start

    gc.collect()
    assert min(cpu_time() for _ in range(3)) < 0.05  # 4 ms where this was written


def test_importing_the_package_registers_all() -> None:
    assert sd_mecha.builtin.configs.__doc__
    known = {config.identifier for config in model_configs.get_all_base()}
    assert known >= DIGESTS.keys()
