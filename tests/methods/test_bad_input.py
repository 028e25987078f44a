"""What merge methods refuse, and that the message says which method, which parameter, and what was expected."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import EmptyMergeError, MergeSpaceError, ParameterError, RecipeTypeError, ShapeError
from sd_mecha.extensions import merge_methods
from tests.methods.row import Row
from tests.methods.table import ROWS

NAN, INF = float("nan"), float("inf")
FINITE, SHARE, NOT_NEGATIVE, POSITIVE = (
    "a finite number",
    "a number in [0, 1]",
    "a number at least 0",
    "a number above 0",
)

REFUSED: dict[str, dict[str, tuple[str, list[Any]]]] = {
    **{
        name: {"alpha": (FINITE, [NAN, INF])}
        for name in (
            "slerp",
            "geometric_sum",
            "add_difference",
            "scale",
            "multiply_quotient",
            "add_cosine_a",
            "add_cosine_b",
            "train_difference_mask",
            "add_opposite_mask",
            "add_strict_opposite_mask",
        )
    },
    "clamp": {"stiffness": (FINITE, [NAN, INF])},
    "crossover": {"alpha": (SHARE, [NAN, 1.5, -0.5]), "tilt": (FINITE, [NAN, INF])},
    "tensor_sum": {"width": (FINITE, [NAN, INF]), "offset": (FINITE, [NAN, -INF])},
    "top_k_tensor_sum": {"width": (FINITE, [NAN, INF]), "offset": (FINITE, [NAN, -INF])},
    "geometric_median": {
        "eps": (POSITIVE, [0.0, NAN]),
        "maxiter": (NOT_NEGATIVE, [-1]),
        "ftol": (NOT_NEGATIVE, [-1.0, NAN]),
    },
    "model_stock": {"cos_eps": (POSITIVE, [0.0, -1.0, NAN]), "pairs": ("'all' or 'adjacent'", ["some"])},
    "ties_sum": {"k": (NOT_NEGATIVE, [-0.1, NAN])},
    "ties_sum_extended": {
        "k": (NOT_NEGATIVE, [-0.1, NAN]),
        "cos_eps": (POSITIVE, [0.0, NAN]),
        "eps": (POSITIVE, [0.0, NAN]),
        "maxiter": (NOT_NEGATIVE, [-1]),
        "ftol": (NOT_NEGATIVE, [-1.0]),
    },
    "rotate": {name: (FINITE, [NAN, INF, -INF]) for name in ("alpha", "alignment", "centralization")},
    "dropout": {
        "probability": (SHARE, [-0.5, 1.5, NAN]),
        "overlap_emphasis": (SHARE, [-1.0, 2.0, NAN]),
        "rescale": (FINITE, [NAN, INF, -INF]),
        "overlap": (FINITE, [NAN, INF, -INF]),
    },
    "ties_sum_with_dropout": {
        "probability": (SHARE, [-0.5, 1.5, NAN]),
        "della_eps": (FINITE, [NAN, INF, -INF]),
        "k": (NOT_NEGATIVE, [-1.0, NAN]),
        "cos_eps": (POSITIVE, [0.0]),
        "eps": (POSITIVE, [0.0]),
        "maxiter": (NOT_NEGATIVE, [-1]),
        "ftol": (NOT_NEGATIVE, [NAN]),
    },
    "truncate_rank": {"approximate_basis_iters": (NOT_NEGATIVE, [-1])},
    "truncate_kronecker": {
        "approximate_basis_iters": (NOT_NEGATIVE, [-1]),
        "kronecker_ratio": (SHARE, [-0.1, 1.5, NAN]),
    },
    "get_rank_from_ratio": {"ratio": (SHARE, [NAN])},
    "cast": {"device": ("a device such as 'cpu' or 'cuda:0'", ["nowhere"])},
}
"""For each method, its parameters that have a range, how the range is called, and values outside of it.

Some values outside a range count as its nearer end instead, as they did in release 1; see the methods."""

ROW = {row.name: row for row in reversed(ROWS) if not row.recipe}
CALLED = [pytest.param(row, id=row.name) for row in ROW.values() if row.build is None]


def models(row: Row, spaces: tuple[str, ...] | None = None) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    spaces = row.spaces if spaces is None else spaces
    return [sd_mecha.model({"w": torch.randn(3, 4, generator=generator)}, merge_space=space) for space in spaces]


def merge(recipe: Any, **options: Any) -> Any:
    return sd_mecha.merge(recipe, strict_merge_space=None, threads=0, **options)


@pytest.mark.parametrize(
    ("method", "parameter", "expected", "value"),
    [
        pytest.param(method, parameter, expected, value, id=f"{method}-{parameter}-{value}")
        for method, parameters in REFUSED.items()
        for parameter, (expected, values) in parameters.items()
        for value in values
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(method: str, parameter: str, expected: str, value: Any) -> None:
    recipe = merge_methods.resolve(method)(*models(ROW[method]), **{parameter: value})
    with pytest.raises(ParameterError) as error:
        merge(recipe)
    assert f"{method}: {parameter} is {value!r}; expected {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("geometric_median", {"eps": 0.0}, "geometric_median: eps is 0.0; expected a number above 0"),
        ("model_stock", {"pairs": "some"}, "model_stock: pairs is 'some'; expected 'all' or 'adjacent'"),
        ("crossover", {"alpha": 1.5}, r"crossover: alpha is 1.5; expected a number in \[0, 1\]"),
        ("tensor_sum", {"width": INF}, "tensor_sum: width is inf; expected a finite number"),
        ("slerp", {"alpha": NAN}, "slerp: alpha is nan; expected a finite number"),
    ],
)
def test_values_are_refused_while_planning(method: str, options: dict[str, Any], message: str) -> None:
    recipe = merge_methods.resolve(method)(*models(ROW[method]), **options)
    with pytest.raises(ParameterError, match=f"^{message}$"):
        sd_mecha.plan(recipe, strict_merge_space=None)


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ParameterError, match="cast: dtype: unknown dtype 'float99'"):
        merge(sd_mecha.cast(models(ROW["cast"])[0], dtype="float99"))


@pytest.mark.parametrize("row", CALLED)
def test_a_call_without_models_names_the_method(row: Row) -> None:
    with pytest.raises((RecipeTypeError, EmptyMergeError), match=rf"\b{row.name}\b"):
        merge(row.node([]))


@pytest.mark.parametrize("row", [case for case in CALLED if not case.values[0].variadic])
def test_a_call_with_too_many_models_names_the_method(row: Row) -> None:
    with pytest.raises(RecipeTypeError, match=rf"{row.name}\(.*(too many positional|multiple values)"):
        row.node(models(row, ("weight",) * 12))


@pytest.mark.parametrize("method", ["ties_sum", "ties_sum_extended", "model_stock", "dropout", "ties_sum_with_dropout"])
def test_a_base_alone_is_too_little(method: str) -> None:
    base = models(ROW["cast"])[0]
    with pytest.raises(ParameterError, match=rf"{method}: got no delta; expected at least one"):
        merge(base + merge_methods.resolve(method)())


def test_clamp_needs_a_bound() -> None:
    with pytest.raises(ParameterError, match="clamp: got no bound; expected at least one"):
        merge(sd_mecha.clamp(models(ROW["cast"])[0]))


@pytest.mark.parametrize("function", ["n_model_stock", "add_difference_ties", "add_ties_with_dare", "dropout"])
def test_a_base_is_needed(function: str) -> None:
    with pytest.raises(TypeError, match=rf"{function}\(\) missing 1 required positional argument"):
        getattr(sd_mecha, function)()


MIXED = [case for case in CALLED if len(case.values[0].spaces) > 1 and case.values[0].of_one_kind]
DECLARED = [case for case in CALLED if case.values[0].spaces[0] == "delta"]


@pytest.mark.parametrize("row", [*MIXED, *(case for case in DECLARED if case not in MIXED)])
def test_models_of_the_wrong_kind_are_refused(row: Row) -> None:
    other = {"weight": "delta", "delta": "weight"}[row.spaces[0]]
    with pytest.raises(MergeSpaceError, match=rf"merge spaces do not agree: {other} .*{row.name}"):
        merge(row.node(models(row, (other, *row.spaces[1:]))))


# rotate looks at the keys of its models one by one, and fallback computes nothing
COMBINED = [
    case for case in CALLED if len(case.values[0].spaces) > 1 and case.values[0].name not in ("rotate", "fallback")
]


@pytest.mark.parametrize("shape", [(4, 3), (1, 4), (4,)], ids=str)
@pytest.mark.parametrize("row", COMBINED)
def test_shapes_that_differ_are_refused_even_where_they_broadcast(row: Row, shape: tuple[int, ...]) -> None:
    nodes = models(row)
    nodes[-1] = sd_mecha.model({"w": torch.ones(shape)}, merge_space=row.spaces[-1])
    with pytest.raises(ShapeError, match=rf"key 'w': {row.name} cannot combine .*\(3, 4\).*{shape[0]}"):
        merge(row.node(nodes))


@pytest.mark.parametrize("alignment", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 3), (1, 4), (4,)], ids=str)
def test_rotate_refuses_shapes_that_differ(shape: tuple[int, ...], alignment: float) -> None:
    a, b = models(ROW["rotate"])[0], sd_mecha.model({"w": torch.ones(shape)}, merge_space="weight")
    method = merge_methods.resolve("rotate")
    with pytest.raises(ShapeError, match=r"rotate: the shapes \(3, 4\) and .* differ; it takes tensors of one shape"):
        merge(method(a, b, alignment=alignment))


@pytest.mark.parametrize("value", [NAN, INF])
def test_inf_and_nan_that_a_method_makes_are_reported_with_their_key(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    @sd_mecha.merge_method(register=False)
    def broken(a: sd_mecha.Parameter(torch.Tensor)) -> sd_mecha.Return(torch.Tensor):  # type: ignore[valid-type]
        return a * value

    with caplog.at_level(logging.WARNING):
        merge(broken(models(ROW["cast"])[0]))
    assert "'w' holds inf or nan" in caplog.text
