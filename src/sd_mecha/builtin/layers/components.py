"""From key -> shape to the components of configs."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from sd_mecha.builtin.layers.basic import Shapes
from sd_mecha.extensions.model_configs import KeyMetadata

Keys = dict[str, KeyMetadata]

_SCHEDULE = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
_STEPS = 1000

SCHEDULE_SIGNS = ("alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "posterior_", "sqrt_")
"""What the names of those tables start with."""

UNET_SIGNS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
"""What the names of the layers of a UNet start with in the original layout."""

DIFFUSERS_UNET_SIGNS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "time_embedding.",
    "add_embedding.",
    "conv_in.",
    "conv_norm_out.",
    "conv_out.",
)
"""The same in that of diffusers."""


def component(
    prefix: str,
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    *,
    optional: Collection[str] = (),
    alias_prefix: str | None = None,
) -> Keys:
    """Return the keys of a part of a model, sorted.

    Args:
        prefix: where the part stands in the checkpoint.
        shapes: key -> shape below the prefix.
        dtype: the dtype that such checkpoints are published in.
        optional: beginnings of the keys, below the prefix, that a model may lack.
        alias_prefix: another place where files carry the part, None if there is none.
    """
    lacking = tuple(optional)
    return {
        prefix + key: KeyMetadata(
            shapes[key],
            dtype,
            () if alias_prefix is None else (alias_prefix + key,),
            optional=key.startswith(lacking),
        )
        for key in sorted(shapes)
    }


def below(prefix: str, signs: Iterable[str]) -> tuple[str, ...]:
    """Return the same starts of names below a prefix."""
    return tuple(prefix + sign for sign in signs)


def checkpoint_signs(*others: str) -> tuple[str, ...]:
    """What the keys of checkpoints of Stable Diffusion in the original layout start with, and those of their own."""
    return (*below("model.diffusion_model.", UNET_SIGNS), "first_stage_model.", *SCHEDULE_SIGNS, *others)


def kohya_signs(*others: str, diffusers: bool) -> tuple[str, ...]:
    """The same by the names of kohya-ss, by whether those of the UNet are those of diffusers."""
    return (*below("unet.", DIFFUSERS_UNET_SIGNS if diffusers else UNET_SIGNS), *others)


def noise_schedule() -> Keys:
    """Return the tables that follow from the noise schedule; they are rarely stored."""
    return dict.fromkeys(_SCHEDULE, KeyMetadata((_STEPS,), torch.float32, optional=True))


def averages(diffuser: Shapes, network: str = "diffusion_model") -> Keys:
    """Return the moving averages of a UNet; their names were stripped of dots when they were made.

    Args:
        diffuser: key -> shape in the UNet.
        network: what the UNet is called in the model that was averaged, empty where it was the whole of it.
    """
    keys = {
        "model_ema.decay": KeyMetadata((), torch.float32, optional=True),
        "model_ema.num_updates": KeyMetadata((), torch.int32, optional=True),
    }
    for key in sorted(diffuser, key=lambda key: key.replace(".", "")):
        flat = key.replace(".", "")
        aliases = (f"model_ema.{flat}",) if network else ()
        keys[f"model_ema.{network}{flat}"] = KeyMetadata(diffuser[key], torch.float32, aliases, optional=True)
    return keys
