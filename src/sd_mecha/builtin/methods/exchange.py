"""Swapping parts within one checkpoint."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method

DIFFUSER_PREFIX = "model."
EMA_PREFIX = "model_ema."


@merge_method(is_interface=True)
def exchange_ema(model: Parameter(StateDict[Tensor])) -> Return(Tensor):
    """Swap the trained weights of a checkpoint with their moving averages, where the checkpoint carries both.

    Formula: `result[w] = model[ema of w]` and the reverse; other keys stay. A key whose counterpart is
    missing is left out, so a checkpoint without averages loses its diffuser: write `exchange_ema(model) |
    model` to keep it.

    Args:
        model: a whole checkpoint of a config that has averages (sd1-ldm).

    Use when: the averages should be merged, or used, in place of the last training step.
    Cost: none; bytes are copied.
    Source: exponential moving averages of weights, Polyak and Juditsky 1992.

    >>> [implementation.identifier for implementation, _ in exchange_ema.interface.candidates]
    ["exchange_ema_'sd1-ldm'"]
    """


@merge_method(identifier="exchange_ema_'sd1-ldm'", implements=exchange_ema, tiling="select", reuse_outputs=False)
class exchange_ema_sd1_ldm:
    """Swap trained weights and moving averages of a Stable Diffusion 1 checkpoint; see `exchange_ema`."""

    @staticmethod
    def map_keys(builder: Any) -> None:
        keys = set(builder.out.keys())
        averages = {key: ema for key in keys if (ema := ema_key(key)) in keys}
        partner = averages | {ema: key for key, ema in averages.items()}
        for key in builder.out.keys():  # noqa: SIM118 (it is no mapping)
            own = builder.model.keys[key]
            # an exchange needs both; what has no partner in the config stays
            builder[key] = builder.model.keys[partner[key]] & own if key in partner else own

    def __call__(self, model: Parameter(StateDict[Tensor], model_config="sd1-ldm"), **kwargs: Any) -> Return(
        Tensor, model_config="sd1-ldm"
    ):
        return model[kwargs["key_relation"].inputs["model"][0]]


def ema_key(key: str) -> str | None:
    """Where the average of a diffuser weight is stored: its name without dots, behind a prefix of its own."""
    if not key.startswith(DIFFUSER_PREFIX):
        return None
    return EMA_PREFIX + key.removeprefix(DIFFUSER_PREFIX).replace(".", "")
