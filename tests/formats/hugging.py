"""Tiny models of real classes, saved as their libraries save them, and loaded as their users load them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sd_mecha

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 48,
}


def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers, kept from asking anybody; the test is skipped where it is missing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def make(transformers: Any, kind: str, seed: int, **changes: Any) -> Any:
    """A model with random weights of its own."""
    torch.manual_seed(seed)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 48}
        config = transformers.T5Config(**sizes, **changes)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=3, **changes)
        return transformers.MixtralForCausalLM(config)
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8, **changes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **changes))


def stable_diffusion(transformers: Any, diffusers: Any, seed: int, folder: Path) -> Any:
    """A pipeline with random weights of its own; the folder is for the vocabulary that it reads."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    vocabulary = folder / "vocab"
    vocabulary.mkdir(exist_ok=True)
    words = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (vocabulary / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=4, eos_token_id=5, pad_token_id=5,
        )
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text, tokenizer=tokenizer, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the files of a folder, as the reference implementation reads them."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def loaded(auto: Any, folder: Path) -> Any:
    """The model that a user of the library gets, with nothing in the files left over and nothing made up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def averaged(*paths: Path, **options: Any) -> dict[str, torch.Tensor]:
    result = sd_mecha.merge(sd_mecha.n_average(*map(sd_mecha.model, paths)), tqdm=None, **options)
    return {} if result is None else {key: result[key] for key in result if key != "__metadata__"}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))
