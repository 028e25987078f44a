"""Built-in model configs; importing this package registers them and builds none."""

from __future__ import annotations

import importlib

_PLAIN = ("singleton", "supermerger_blocks", "sd1", "sdxl", "sd3", "flux", "loras")
_TRANSFORMERS = ("flux2", "auraflow", "hunyuan_video", "wan", "ltxv", "cosmos", "hidream", "pixart", "qwen_image")
_OTHERS = ("lumina", "unet_families", "autoencoders", "video_autoencoder", "encoder_families")

for _name in (*_PLAIN, *_TRANSFORMERS, *_OTHERS):
    importlib.import_module(f"{__name__}.{_name}")
