"""Changes that are stored as they are: of weights, of biases and of norms; and weights that replace others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sd_mecha.builtin.adapters.common import fitted
from sd_mecha.extensions.adapters import AdapterKind, Delta, Shape, register_adapter


def _stored(part: str) -> Delta:
    def delta(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
        return fitted(parts[part], shape)

    return delta


def _replacing(parts: Mapping[str, Tensor], shape: Shape, base: Tensor | None) -> Tensor:
    assert base is not None
    return fitted(parts["set_weight"], base.shape) - base


def _kind(name: str, part: str, parameter: str) -> AdapterKind:
    needs = (frozenset({part}),)
    spelled = {"common": {part: part}}
    return register_adapter(AdapterKind(name, spelled, needs, _stored(part), parameter=parameter, rows={part: 0}))


FULL = _kind("full", "diff", "weight")
FULL_BIAS = _kind("full_bias", "diff_b", "bias")
NORM = _kind("norm", "w_norm", "weight")
NORM_BIAS = _kind("norm_bias", "b_norm", "bias")

SET = register_adapter(
    AdapterKind(
        "set",
        {"common": {"set_weight": "set_weight"}},
        (frozenset({"set_weight"}),),
        _replacing,
        base_for=frozenset({"set_weight"}),
    )
)
