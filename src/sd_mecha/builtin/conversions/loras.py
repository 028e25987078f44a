"""From LoRA and LoKr factors to what they change in the weights: a delta of the layout that the file refers to."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

from torch import Tensor

from sd_mecha.builtin.adapters.common import fitted
from sd_mecha.builtin.adapters.lokr import lokr_delta
from sd_mecha.builtin.adapters.lora import lora_delta
from sd_mecha.builtin.configs.loras import BASES, PREFIXES, modules
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method

_LORA = (("lora_mid.weight", "lora_up.weight", "lora_down.weight"), ("lora_up.weight", "lora_down.weight"))
_LOKR_FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_LOKR_SECOND = (("lokr_w2_a", "lokr_w2_b", "lokr_t2"), ("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))

VARIANTS = tuple(
    (*factors, *alpha)
    for factors in (*_LORA, *(first + second for first in _LOKR_FIRST for second in _LOKR_SECOND))
    for alpha in (("alpha",), ())
)
"""The sets of factors that make a delta, the preferred one first."""


def module_delta(factors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The change of the weight of one module.

    Args:
        factors: factor -> tensor, as one of `VARIANTS` names them.
        shape: shape of the weight in a usual model.
    """
    alpha = factors.get("alpha")
    if "lora_up.weight" in factors:
        up, down = factors["lora_up.weight"], factors["lora_down.weight"]
        return fitted(lora_delta(up, down, factors.get("lora_mid.weight"), alpha), shape)
    named = {name.removeprefix("lokr_"): tensor for name, tensor in factors.items()}
    return fitted(lokr_delta(**named), shape)


def _conversion(base: str, kind: str) -> None:
    """Declare the conversion of the files of one kind that refer to one layout."""
    prefix = PREFIXES[kind]

    @merge_method(identifier=f"convert_'{base}_{kind}'_to_base", is_conversion=True)
    class convert_lora_to_base:
        """Multiply the factors of a LoRA out to a delta.

        Formula: LoRA `alpha / rank * up @ down`, with the kernel between them for a LoCon in three factors; LoKr
        `alpha / rank * kron(w1, w2)`, either of which may be a product; without an alpha, or without a rank, unscaled.

        Args:
            lora: a LoRA file; modules that it lacks are left out.

        Use when: a LoRA should be merged; `sd_mecha.convert` finds it, and what follows to the layout of a checkpoint.
        Cost: whole tensor; one product of small matrices per weight.
        Source: Hu et al., arXiv 2106.09685; Yeh et al., arXiv 2309.14859.

        >>> import torch
        >>> module_delta({"lora_up.weight": torch.ones(2, 1), "lora_down.weight": torch.ones(1, 3)}, (2, 3, 1, 1)).shape
        torch.Size([2, 3, 1, 1])
        """

        @staticmethod
        def map_keys(builder: Any) -> None:
            for key, module in modules(model_configs.resolve(base), prefix).items():
                needs = (builder.lora.keys[tuple(f"{module}.{factor}" for factor in variant)] for variant in VARIANTS)
                builder[key] = reduce(operator.or_, needs)

        def __call__(self, lora: StateDict[Tensor], **kwargs: Any) -> Tensor:
            factors = {name.partition(".")[2]: lora[name] for name in kwargs["key_relation"].inputs["lora"]}
            shape = model_configs.resolve(base).keys()[kwargs["key"]].shape
            assert shape is not None  # modules are told by it
            return module_delta(factors, shape)

        # set here because names of this function cannot stand in the annotations above
        __call__.__annotations__ |= {
            "lora": Parameter(StateDict[Tensor], "weight", f"{base}_{kind}"),
            "return": Return(Tensor, "delta", base),
        }


for _base in BASES:
    for _kind in PREFIXES:
        _conversion(_base, _kind)
