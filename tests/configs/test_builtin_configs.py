"""The built-in configs against digests of the listings that they must reproduce."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
import time

import pytest

import sd_mecha.builtin.configs
from sd_mecha.builtin.configs.loras import BASES, PREFIXES
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
    "sd1-kohya": (
        {"clip_l": 196, "diffuser": 686, "vae": 248},
        "b55e84d01969bf3f4eb0a61d6f3803bd29fc33f2a7d17cace56ead6bf0dd5160",
        "ea3afd3b64e351af54a5caf266bda37119d0a569dc5878309c2917decff37de0",
    ),
    "sdxl-sgm": (
        {"clip_l": 197, "clip_g": 390, "vae": 248, "diffuser": 1684, "scheduler": 12},
        "f1bce87a43d412f2def3a45b8cdbbdb6fd4923a0afeaa845637eda77f9f9f02d",
        "7a9b56edc5a8525db5a5070f3d73832a61265b2b305de9cb920b7fcfd4f231e0",
    ),
    "sdxl-kohya": (
        {"vae": 248, "clip_l": 197, "clip_g": 517, "diffuser": 1680},
        "57cfa91289b0809bd8b2dba4770572d492576e556897b9b82d093aedb2bc1696",
        "e2cdd0aaaa882e1ae64d0f971664f027d58eabbc8aebe4b63d9f3b8f34a4901b",
    ),
    "sdxl-kohya_but_diffusers": (
        {"vae": 248, "clip_l": 197, "clip_g": 517, "diffuser": 1680},
        "228ddf065b96702752a61a760a11a2c36a27efda27c55ec44507617c27d35898",
        "d39c95b6883d7ea8df3112a24d7c06225f397439d94765925d909070ecad2cb3",
    ),
    "sdxl-diffusers_unet_only": (
        {"diffuser": 1680},
        "1252d970e55232bbd2526e7f7f8116e2bd481ea0e8be98a3e70edeb3fc5e22ac",
        "e17fd971b1dac07d13d43998f4b3959694fcfe44e312bf7c6833d5c4cbb5fd4c",
    ),
    "sd3-comfyui": (
        {"vae": 244, "diffuser": 492, "clip_g": 518, "clip_l": 198, "t5xxl": 220},
        "dd4b2322505da48fcce8b6d179183283d9d146e46e9c8cbc864498618d905f14",
        "52efa6f1455079b4368fef0ee25967877e50c63d9640484ce1c6b291e8ec78c8",
    ),
    "flux-flux": (
        {"diffuser": 780, "clip_l": 196, "t5xxl": 219, "vae": 244},
        "adb048f8f8bdca0653f2161cdd8396f04f021be4a2d25229dfd263651dc82339",
        "39c207b89470ce295ab46a91a90902520a2016dd9d95b82bed7db8da45801659",
    ),
    "sd1-kohya_kohya_lora": (
        {"clip_l": 814, "diffuser": 3102, "vae": 792},
        "7de027431a27c6367bc55021cb4e9e4a220b263f48064e4d9eeb62cd873eefe1",
        "da7a10262f85689613ce8efb199c2da4eba7cd0ad1c2f50c37a29adb57e7c68d",
    ),
    "sd1-kohya_lycoris_lora": (
        {"clip_l": 814, "diffuser": 3102, "vae": 792},
        "1e6c0ba6284ed3eac5fc8a862609b65822cb359c6b721e6e19a33ff9c1fc2ee0",
        "7e01faa2f4e7bedf4fb44041e164bc1cabe59d95b516451343e4091c67b34cd1",
    ),
    "sdxl-kohya_kohya_lora": (
        {"vae": 792, "clip_l": 814, "clip_g": 2145, "diffuser": 8734},
        "dae4f081c8404a1db47790f82c7a7d7ad3b723ea35110ad2d2147478ab12256b",
        "487111d8e0b4d28b67e638576ea31dd5062c9a2dcc2fc61c271cbe07e7aae4af",
    ),
    "sdxl-kohya_lycoris_lora": (
        {"vae": 792, "clip_l": 814, "clip_g": 2145, "diffuser": 8734},
        "2ed6889b4ba607bb8ecf4db0d42fd4be96265498b81ec16f21c032a31fc849b2",
        "5ea5dd229a4136725677bc90da835343e047c8871039ba78c68f38261878cf17",
    ),
    "sdxl-kohya_but_diffusers_kohya_lora": (
        {"vae": 792, "clip_l": 814, "clip_g": 2145, "diffuser": 8734},
        "a38110175c594636099bbb9fb3266f2ee29a49652bbfcc253b00bc7eaed4c02b",
        "00cab34625a3dcefb600e817037d6a089bcbf95d9a6759b6898d9c763af72d52",
    ),
    "sdxl-kohya_but_diffusers_lycoris_lora": (
        {"vae": 792, "clip_l": 814, "clip_g": 2145, "diffuser": 8734},
        "5b2fa0166831b0c5d94d2d84c209c5027cd72ff3b1d7fd9c10584356c6e91d68",
        "9b5c16a080f1446863f9cab613cfdb82a3a6ee7736373bedb39517f99ad98bb6",
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


def test_text_encoders_of_other_libraries() -> None:
    """Sizes that the shared layers make for one encoder in two layouts."""
    sgm, kohya = model_configs.resolve("sdxl-sgm").keys(), model_configs.resolve("sdxl-kohya").keys()
    fused = sgm["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"]
    apart = kohya["te2.text_model.encoder.layers.31.self_attn.q_proj.weight"]
    assert (fused.shape, fused.optional) == ((3840, 1280), True)
    assert (apart.shape, apart.optional) == ((1280, 1280), True)
    bias = "transformer.encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    flux = model_configs.resolve("flux-flux")
    assert flux.keys()[f"text_encoders.t5xxl.{bias.format(0)}"].shape == (32, 64)
    assert f"text_encoders.t5xxl.{bias.format(1)}" not in flux.keys()  # noqa: SIM118 (one mapping for both)
    assert flux.find("single_blocks.37.linear2.bias") == "model.diffusion_model.single_blocks.37.linear2.bias"


def test_the_last_joint_block_leaves_the_text_as_it_is() -> None:
    keys = model_configs.resolve("sd3-comfyui").keys()
    block = "model.diffusion_model.joint_blocks.{}.context_block.{}.weight"
    assert keys[block.format(22, "adaLN_modulation.1")].shape == (9216, 1536)
    assert keys[block.format(23, "adaLN_modulation.1")].shape == (3072, 1536)
    assert block.format(23, "mlp.fc1") not in keys


@pytest.mark.parametrize("base", BASES)
def test_loras_name_the_matrices_and_kernels_of_their_base(base: str) -> None:
    keys = model_configs.resolve(base).keys()
    lora = model_configs.resolve(f"{base}_lycoris_lora")
    ups = {key.partition(".")[0] for key in lora.keys() if key.endswith(".lora_up.weight")}  # noqa: SIM118
    weights = {key for key, metadata in keys.items() if len(metadata.shape or ()) > 1 and key.endswith(".weight")}
    assert ups == {"lycoris_" + key.removesuffix(".weight").replace(".", "_") for key in weights}
    assert all(metadata.optional for metadata in lora.keys().values())
    assert lora in model_configs.get_all_aux()


def test_importing_builds_nothing() -> None:
    code = (
        "from sd_mecha.builtin.configs import sd1, sd3, sdxl\n"
        "from sd_mecha.extensions.model_configs import resolve\n"
        "sd1.build = sdxl.build = sd3.build = lambda *sizes: 1 / 0\n"
        "for name in ('sd1-ldm', 'sd1-kohya', 'sdxl-sgm', 'sd3-comfyui', 'sdxl-kohya_kohya_lora'):\n"
        "    try:\n"
        "        resolve(name).keys()\n"
        "    except ZeroDivisionError:\n"
        "        continue\n"
        "    raise SystemExit(f'{name} was built before it was used')\n"
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
    known = {config.identifier for config in model_configs.get_all()}
    assert known >= DIGESTS.keys()
    base = {config.identifier for config in model_configs.get_all_base()}
    assert DIGESTS.keys() - base == {f"{base}_{kind}" for base in BASES for kind in PREFIXES}
