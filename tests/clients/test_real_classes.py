"""Converted state dicts load into the classes of diffusers, which are built without memory, strictly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sd_mecha.extensions import merge_methods, model_configs, translations

diffusers: Any = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers warns of itself

_HEADS_24 = {"num_attention_heads": 24, "attention_head_dim": 128}
_FLUX1 = {"num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096}
_WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_COSMOS = {
    "in_channels": 16,
    "text_embed_dim": 1024,
    "adaln_lora_dim": 256,
    "extra_pos_embed_type": None,
}

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1_dev-diffusers": ("FluxTransformer2DModel", {**_FLUX1, "guidance_embeds": True}),
    "flux1_schnell-diffusers": ("FluxTransformer2DModel", {**_FLUX1, "guidance_embeds": False}),
    "flux2_dev-diffusers": ("Flux2Transformer2DModel", {}),
    "flux2_klein_4b-diffusers": (
        "Flux2Transformer2DModel",
        {
            **_HEADS_24,
            "num_layers": 5,
            "num_single_layers": 20,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "flux2_klein_9b-diffusers": (
        "Flux2Transformer2DModel",
        {
            "num_attention_heads": 32,
            "num_layers": 8,
            "num_single_layers": 24,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    ),
    "chroma1-diffusers": ("ChromaTransformer2DModel", {}),
    "hunyuan_video-diffusers": ("HunyuanVideoTransformer3DModel", {}),
    "auraflow_v0.3-diffusers": ("AuraFlowTransformer2DModel", {"pos_embed_max_size": 9216}),
    "sd3_medium-diffusers": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "sd35_medium-diffusers": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "sd35_large-diffusers": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "wan21_t2v_1.3b-diffusers": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "wan21_t2v_14b-diffusers": ("WanTransformer3DModel", _WAN_14B),
    "wan21_i2v_14b-diffusers": (
        "WanTransformer3DModel",
        {**_WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "wan22_i2v_a14b-diffusers": ("WanTransformer3DModel", {**_WAN_14B, "in_channels": 36}),
    "wan22_ti2v_5b-diffusers": (
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    ),
    "ltxv_2b_v0.9-diffusers": ("LTXVideoTransformer3DModel", {}),
    "ltxv_13b_v0.9.7-diffusers": (
        "LTXVideoTransformer3DModel",
        {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    ),
    "cosmos_predict2_2b_t2i-diffusers": (
        "CosmosTransformer3DModel",
        {**_COSMOS, "num_attention_heads": 16, "num_layers": 28},
    ),
    "cosmos_predict2_14b_t2i-diffusers": (
        "CosmosTransformer3DModel",
        {**_COSMOS, "num_attention_heads": 40, "num_layers": 36},
    ),
    "pixart_sigma_xl_2_1024_ms-diffusers": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "use_additional_conditions": False, "caption_channels": 4096},
    ),
    "lumina2-diffusers": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "z_image-diffusers": ("ZImageTransformer2DModel", {}),
    "qwen_image-original": ("QwenImageTransformer2DModel", {}),
    "hidream_i1-original": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 16,
            "num_single_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 20,
            "caption_channels": [4096, 4096],
            "text_emb_dim": 2048,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (64, 32, 32),
            "max_resolution": (128, 128),
            "llama_layers": list(range(48)),
        },
    ),
    "sdxl-diffusers_unet_only": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


def built(identifier: str) -> Any:
    """The class of a config, without memory."""
    name, arguments = CLASSES[identifier]
    with torch.device("meta"):
        return getattr(diffusers, name)(**arguments)


def weightless(identifier: str, optional: bool = True) -> dict[str, torch.Tensor]:
    """A state dict of that config without memory."""
    keys = model_configs.resolve(identifier).keys()
    return {
        key: torch.empty(m.shape or (), dtype=m.dtype, device="meta")
        for key, m in keys.items()
        if optional or not m.optional
    }


@pytest.mark.parametrize("identifier", CLASSES)
def test_a_config_has_the_keys_and_shapes_of_the_class(identifier: str) -> None:
    built(identifier).load_state_dict(weightless(identifier, optional=False), strict=True, assign=True)


@pytest.mark.parametrize("identifier", [i for i in CLASSES if i.endswith("-diffusers")])
def test_what_other_layouts_convert_to_loads(identifier: str) -> None:
    target = model_configs.resolve(identifier)
    sources = translations.neighbours(identifier)
    assert sources
    for source in sources:
        assert identifier in dict(merge_methods.get_conversions_from(source))
        links = translations.links_between(model_configs.resolve(source), target)
        tensors = weightless(source)
        assert links is not None
        converted = {key: translations.apply(link, tensors) for key, link in links.items()}
        built(identifier).load_state_dict(converted, strict=True, assign=True)
