"""One row for each built-in merge method and ready-made recipe: how to call it, which laws hold, which must break.

The laws are those of `law_checks.py`. A row takes a position on every law that applies to it: a method about which
nothing is said, or only half of it, fails `test_table.py`. Parameters are such that a method does what it is for;
what it does at the ends of their ranges is in `ends`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sd_mecha
from sd_mecha.extensions import merge_methods
from tests.methods.recipe_rows import RECIPES
from tests.methods.row import (
    D1,
    D3,
    HOMOGENEOUS,
    IDENTITY,
    KEPT,
    LINEAR,
    STOCK,
    SYMMETRIES,
    TIES,
    W1,
    W2,
    W3,
    W4,
    Nodes,
    Row,
)


def _fallback_of_itself(nodes: Nodes, options: Mapping[str, Any]) -> Any:
    """A component that is left out, and filled up again."""
    return sd_mecha.omit_component(nodes[1], **options) | nodes[0]


def _asked(question: str, option: str) -> Callable[[Nodes, Mapping[str, Any]], Any]:
    """A cast to what a question about the model itself answers."""

    def build(nodes: Nodes, _options: Mapping[str, Any]) -> Any:
        return sd_mecha.cast(nodes[0], **{option: merge_methods.resolve(question)(nodes[0])})

    return build


def _scaled_by_a_number(nodes: Nodes, _options: Mapping[str, Any]) -> Any:
    number = merge_methods.resolve("convert_singleton")(sd_mecha.value_to_node(0.5))
    return merge_methods.resolve("scale")(nodes[0], number)


AVERAGES = (
    Row(
        "weighted_sum",
        W2,
        {"alpha": 0.3},
        holds=f"copies {LINEAR} backwards between",
        breaks="order idempotent length",
        ends=[({"alpha": 0}, 0), ({"alpha": 1}, 1)],
    ),
    Row(
        "slerp",
        W2,
        {"alpha": 0.3},
        holds=f"{KEPT} backwards length",
        breaks="shift order idempotent between",
        ends=[({"alpha": 0}, 0), ({"alpha": 1}, 1)],
        tolerance=1e-6,
    ),
    Row(
        "geometric_sum",
        W2,
        {"alpha": 0.3},
        holds=f"{KEPT} backwards",
        breaks="shift order idempotent length between",
        ends=[({"alpha": 0}, 0), ({"alpha": 1}, 1)],
    ),
    Row(
        "n_average",
        W3,
        holds=f"copies order {LINEAR} between agreement",
        breaks="idempotent bystander robust disjoint",
        ends=[({}, 0)],
        variadic=True,
    ),
    Row(
        "geometric_median",
        W3,
        holds=f"copies order {LINEAR} between robust",
        breaks="idempotent bystander agreement disjoint",
        ends=[({}, 0)],
        variadic=True,
        tolerance=1e-4,
    ),
    Row(
        "clamp",
        W4,
        {"stiffness": 0.5},
        holds=f"copies {LINEAR} between idempotent robust",
        breaks="order bystander agreement disjoint",
        variadic=True,
        generic=True,
    ),
    Row(
        "crossover",
        W2,
        {"alpha": 0.4, "tilt": 0.5},
        holds="copies shift scale odd zeros",
        breaks=f"order backwards {SYMMETRIES} length between idempotent",
        ends=[({"alpha": 0.0}, 0), ({"alpha": 1.0}, 1)],
    ),
    Row(
        "rotate",
        W2,
        {"alpha": 0.3, "alignment": 0.5},
        holds=f"{KEPT} backwards",
        breaks="shift order length between idempotent",
        ends=[({"alpha": 0.0, "alignment": 0.0}, 0)],
        generic=True,
        tolerance=1e-6,
    ),
    *(
        Row(
            name,
            W2,
            {"alpha": 0.1},
            holds=f"{KEPT} between",
            breaks="shift order backwards length idempotent",
            ends=ends,
        )
        # with a model of zeros, the second is the first model at any alpha
        for name, ends in (("add_cosine_a", [({"alpha": 1.0}, 1), ({"alpha": 1.5}, 1)]), ("add_cosine_b", []))
    ),
    Row(
        "multiply_quotient",
        W3,
        holds=KEPT,
        breaks="shift order between idempotent",
        ends=[({"alpha": 0.0}, 0)],
    ),
)

DIFFERENCES = (
    Row(
        "add_difference",
        "weight delta",
        {"alpha": 0.7},
        holds=LINEAR,
        breaks="idempotent",
        ends=[({"alpha": 0.0}, 0)],
    ),
    Row("subtract", W2, returns="delta", holds=LINEAR, breaks="order"),
    Row("scale", D1, {"alpha": 0.7}, holds=HOMOGENEOUS, breaks="copies idempotent", ends=[({"alpha": 1.0}, 0)]),
    Row("perpendicular_component", W2, holds=HOMOGENEOUS, breaks="copies shift order between idempotent"),
    *(
        Row(name, W3, {"alpha": 0.7}, returns="param", holds=LINEAR, breaks="order")
        for name in ("train_difference_mask", "add_opposite_mask", "add_strict_opposite_mask")
    ),
)

DELTAS = (
    Row(
        "ties_sum",
        D3,
        TIES,
        holds=f"{KEPT} order between bystander agreement disjoint",
        breaks="idempotent robust",
        variadic=True,
    ),
    Row(
        "ties_sum",
        D3,
        {"k": 0.3},
        note="trimmed",
        holds=f"{HOMOGENEOUS} order bystander",
        breaks="copies between agreement disjoint idempotent robust",
        variadic=True,
    ),
    Row("ties_sum", D1, {"k": 0.3}, note="of one", holds=f"{HOMOGENEOUS} idempotent", breaks="copies"),
    Row(
        "ties_sum_extended",
        D3,
        TIES | STOCK | {"apply_stock": True},
        note="with stock",
        holds=f"{KEPT} order",
        breaks="between bystander agreement disjoint idempotent robust",
        variadic=True,
    ),
    Row(
        "ties_sum_extended",
        D3,
        TIES | {"apply_median": True},
        note="with median",
        holds=f"{KEPT} order between robust",
        breaks="bystander agreement disjoint idempotent",
        variadic=True,
        tolerance=1e-4,
    ),
    Row(
        "model_stock",
        D3,
        STOCK,
        holds=f"{KEPT} order",
        breaks="between bystander agreement disjoint idempotent robust",
        ends=[({}, 0)],
        variadic=True,
    ),
    Row(
        "model_stock",
        D3,
        STOCK | {"filter_wise": True, "pairs": "adjacent"},
        note="of neighbours",
        holds=KEPT,
        breaks="order between bystander agreement disjoint idempotent robust",
        variadic=True,
    ),
    Row(
        "dropout",
        D3,
        {"probability": 0.5, "seed": 3},
        holds="scale odd zeros",
        breaks=f"copies order {SYMMETRIES} between bystander agreement disjoint idempotent robust",
        variadic=True,
    ),
    Row(
        "ties_sum_with_dropout",
        D3,
        TIES | {"probability": 0.5, "seed": 3},
        holds="scale odd zeros bystander",
        breaks=f"copies order {SYMMETRIES} between agreement disjoint idempotent robust",
        variadic=True,
    ),
    Row(
        "ties_sum_with_dropout",
        D3,
        TIES | {"probability": 0.0},
        note="without dropout",
        holds=f"{KEPT} order between bystander agreement disjoint",
        breaks="idempotent robust",
        variadic=True,
    ),
    *(
        Row(
            "truncate_rank",
            D1,
            {"rank": 1, "use_approximate_basis": approximate},
            note="by a random basis" if approximate else "",
            holds=f"{HOMOGENEOUS} idempotent",
            breaks="copies",
            ends=[({"rank": 1000}, 0)],
            generic=True,
        )
        for approximate in (False, True)
    ),
    Row(
        "truncate_kronecker",
        D1,
        holds="scale odd zeros idempotent",
        breaks=f"copies {SYMMETRIES}",
        ends=[({"kronecker_ratio": 0.0}, 0)],
        generic=True,
    ),
)

COPIES = (
    Row(
        "tensor_sum",
        W2,
        {"width": 0.5},
        holds="copies shift scale odd zeros columns between idempotent",
        breaks="order rows",
        ends=[({"width": 0.0}, 0), ({"width": 1.0}, 1), ({"width": 1.0, "offset": 0.3}, 1)],
    ),
    Row(
        "top_k_tensor_sum",
        W2,
        {"width": 1.0},
        holds=KEPT + " idempotent",
        breaks="shift order between",
        ends=[({"width": 0.0}, 0)],
        generic=True,
    ),
    Row("fallback", W2, holds=f"{IDENTITY} between", breaks="order", ends=[({}, 0)]),
    Row("pick_component", W1, {"component": "keys"}, holds=IDENTITY, ends=[({}, 0)]),
    Row(
        "omit_component",
        W2,
        {"component": "keys"},
        build=_fallback_of_itself,
        holds=f"{IDENTITY} between",
        breaks="order",
        ends=[({}, 0)],
    ),
    Row("omit_non_finite", W1, holds=IDENTITY, ends=[({}, 0)]),
    Row("cast", W1, holds=IDENTITY, ends=[({}, 0)]),
    Row(
        "cast",
        W1,
        {"dtype": "int8"},
        note="to integers",
        holds="zeros rows columns idempotent odd",
        breaks="copies shift scale",
    ),
    Row("get_dtype", W1, build=_asked("get_dtype", "dtype"), holds=IDENTITY, ends=[({}, 0)]),
    Row("get_device", W1, build=_asked("get_device", "device"), holds=IDENTITY, ends=[({}, 0)]),
    Row("convert_singleton", D1, build=_scaled_by_a_number, holds=HOMOGENEOUS, breaks="copies idempotent"),
    Row("get_rank_from_ratio", W1, returns="param", holds=f"shift scale odd {SYMMETRIES}", breaks="zeros"),
    Row(
        "stack",
        W2,
        holds="scale odd zeros",
        breaks="copies order shift rows columns between idempotent bystander robust agreement disjoint",
        variadic=True,
    ),
)

MOVING_KEYS = {
    "adapter_delta": "tests/adapters/test_kinds.py",
    "exchange_ema": "tests/methods/test_select.py",
    "exchange_ema_'sd1-ldm'": "tests/methods/test_select.py",
    "weights": "tests/methods/test_weights.py",
    **dict.fromkeys(("randperm", "randperm_sdxl_sgm", "randperm_sd1_ldm"), "tests/methods/test_permutations.py"),
    **dict.fromkeys(("rebasin", "rebasin_sdxl_sgm", "rebasin_sd1_ldm"), "tests/methods/test_permutations.py"),
    **dict.fromkeys(
        ("balance_attention", "balance_attention_sdxl_sgm", "balance_attention_sd1_ldm"),
        "tests/methods/test_attention_balance.py",
    ),
}
"""Methods about keys or one architecture instead of tensors of any kind, and where they are tested."""


ROWS = (*AVERAGES, *DIFFERENCES, *DELTAS, *COPIES, *RECIPES)
