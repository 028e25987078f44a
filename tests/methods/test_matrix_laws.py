"""Laws of the methods that see whole matrices: truncations and rotations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sd_mecha
from sd_mecha.builtin.methods.kronecker import factor_shape
from sd_mecha.builtin.methods.orthogonal import Alignment, fractional_orthogonal_matrix_power, procrustes
from sd_mecha.builtin.methods.stiefel import stiefel_interpolate
from sd_mecha.extensions import merge_methods
from sd_mecha.testing import check_merge_method
from tests.methods import reference_matrices

SHAPES = [(6, 6), (20, 7), (7, 20), (3, 30), (1, 9), (9, 1), (4, 5, 6), (6, 4, 3, 3), (4, 3, 2, 2, 2)]
SIDES = st.integers(1, 9)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def merged(
    method: str, *tensors: torch.Tensor, cache: Any = None, space: str = "delta", **options: Any
) -> torch.Tensor:
    node = merge_methods.resolve(method)(*(sd_mecha.model({"w": t}, merge_space=space) for t in tensors), **options)
    caches = None if cache is None else {node: cache}
    return sd_mecha.merge(
        node, strict_merge_space=space, merge_dtype=torch.float64, output_dtype=None, threads=0, cache=caches
    )["w"]


def close(got: torch.Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=tolerance, atol=tolerance)


def tail(a: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(a.flatten(1))[rank:].square().sum())


# --- truncate_rank -----------------------------------------------------------------------------------------------


@given(rows=SIDES, columns=SIDES, rank=st.integers(-1, 10), exact=st.booleans(), seed=st.integers(0, 99))
def test_no_matrix_of_that_rank_is_nearer(rows: int, columns: int, rank: int, exact: bool, seed: int) -> None:
    a = random(rows, columns, seed=seed)
    got = merged("truncate_rank", a, rank=rank, use_approximate_basis=not exact)
    assert int(torch.linalg.matrix_rank(got, tol=1e-9)) <= max(rank, 0)
    assert abs(float((got - a).square().sum()) - tail(a, max(rank, 0))) < 1e-9
    close(merged("truncate_rank", got, rank=rank, use_approximate_basis=not exact), got)


def test_the_randomised_truncation_is_almost_the_best_one() -> None:
    for shape in ((300, 120), (120, 300), (32, 16, 3, 3)):
        a = random(*shape)
        got = merged("truncate_rank", a, rank=10)
        assert float((got - a).square().sum()) < tail(a, 10) * 1.01


@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (40, 20, 3, 3)])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_low_rank_is_found_exactly(shape: tuple[int, ...], seed: int | None) -> None:
    columns = random(*shape).flatten(1).shape[1]
    a = (random(shape[0], 5) @ random(5, columns)).reshape(shape)
    close(merged("truncate_rank", a, rank=5, approximate_basis_seed=seed), a)


def test_a_cache_keeps_the_decomposition_for_lower_ranks() -> None:
    a = random(30, 20)
    for exact in (True, False):
        options: dict[str, Any] = {"use_approximate_basis": not exact}
        cache = merge_methods.resolve("truncate_rank").create_cache()
        plain = merged("truncate_rank", a, rank=6, cache=cache, **options)
        assert cache["w"].keys() >= {"u", "s", "vh"}
        kept = cache["w"]["u"]
        assert torch.equal(merged("truncate_rank", a, rank=6, cache=cache, **options), plain)
        lower = merged("truncate_rank", a, rank=3, cache=cache, **options)
        assert cache["w"]["u"] is kept
        assert float((lower - a).square().sum()) < tail(a, 3) * 1.01
        cache["w"]["s"] = cache["w"]["s"] * 2  # a marker: what lies there is what is used
        close(merged("truncate_rank", a, rank=3, cache=cache, **options), lower * 2)
        merged("truncate_rank", random(8, 20), rank=3, cache=cache, **options)
        assert cache["w"]["u"].shape[0] == 8  # another tensor is decomposed anew


@pytest.mark.parametrize("ratio", [-1.0, 0.0, 0.3, 0.5, 1.0, 7.0])
def test_rank_from_ratio(ratio: float) -> None:
    tensors = {str(i): torch.ones(shape) for i, shape in enumerate([*SHAPES, (), (5,)])}
    got = sd_mecha.merge(sd_mecha.get_rank_from_ratio(sd_mecha.model(tensors), ratio), strict_merge_space="param")
    for name, tensor in tensors.items():
        sides = tensor.flatten(1).shape if tensor.dim() > 1 else (tensor.numel(), 1)
        assert int(got[name]) == round(min(sides) * min(max(ratio, 0), 1))


def test_a_ratio_may_come_from_a_model() -> None:
    delta = sd_mecha.model({"w": random(10, 20), "v": random(10, 20)}, merge_space="delta")
    ratios = sd_mecha.model({"w": torch.tensor(0.2), "v": torch.tensor(0.5)}, merge_space="param")
    ranks = sd_mecha.get_rank_from_ratio(delta, ratios)
    got = sd_mecha.merge(sd_mecha.truncate_rank(delta, rank=ranks), strict_merge_space="delta", output_dtype=None)
    assert [int(torch.linalg.matrix_rank(got[key], tol=1e-4)) for key in ("w", "v")] == [2, 5]


# --- truncate_kronecker ------------------------------------------------------------------------------------------


@given(rows=SIDES, columns=SIDES, ratio=st.floats(0, 1), exact=st.booleans(), seed=st.integers(0, 99))
def test_a_kronecker_product_is_kept_and_nothing_is_nearer(
    rows: int, columns: int, ratio: float, exact: bool, seed: int
) -> None:
    a = random(rows, columns, seed=seed)
    options = {"kronecker_ratio": ratio, "use_approximate_basis": not exact}
    got = merged("truncate_kronecker", a, **options)
    close(merged("truncate_kronecker", got, **options), got)
    p, q = factor_shape(rows, columns, 1, ratio)
    blocks = a.reshape(p, rows // p, q, columns // q).transpose(1, 2).reshape(p * q, -1)
    assert abs(float((got - a).square().sum()) - tail(blocks, 1)) < 1e-9


def test_a_cache_keeps_the_factors() -> None:
    a, cache = random(24, 40), merge_methods.resolve("truncate_kronecker").create_cache()
    got = merged("truncate_kronecker", a, cache=cache)
    assert cache["w"]["kron_dims"] == (6, 4, 5, 8)
    close(torch.kron(cache["w"]["w1"], cache["w"]["w2"]), got)
    cache["w"]["w1"] = cache["w"]["w1"] * 2
    close(merged("truncate_kronecker", a, cache=cache), got * 2)
    merged("truncate_kronecker", a, cache=cache, kronecker_ratio=0.25)
    assert cache["w"]["kron_dims"] == (3, 8, 2, 20)


# --- rotate ------------------------------------------------------------------------------------------------------


def rotation(n: int, seed: int = 0) -> torch.Tensor:
    q = torch.linalg.qr(random(n, n, seed=seed)).Q
    q[:, 0] *= torch.linalg.slogdet(q).sign
    return q


def neurons(a: torch.Tensor) -> torch.Tensor:
    if a.dim() >= 4:
        return a.flatten(2).flatten(0, 1)
    return a.flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("space", ["weight", "delta"])
def test_a_rotated_model_is_recovered(shape: tuple[int, ...], space: str) -> None:
    a = random(*shape)
    rows = neurons(a)
    b = ((rows - rows.mean(0)) @ rotation(rows.shape[1]) + 3).reshape(shape)
    close(merged("rotate", a, b, space=space), b)
    close(merged("rotate", a, b, alpha=0.7, space=space), b)


@pytest.mark.parametrize("shape", [(200, 200), (150, 50), (50, 150)])
def test_single_precision_recovers_a_rotated_model_too(shape: tuple[int, int]) -> None:
    a = random(*shape)
    b = (a - a.mean(0)) @ rotation(shape[1])
    models = [sd_mecha.model({"w": t.float()}) for t in (a, b)]
    got = sd_mecha.merge(sd_mecha.rotate(*models), output_dtype=None)["w"]
    assert float((got - b).norm()) < 1e-3 * float(b.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alignment", [-1.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_rotate_is_the_long_computation(shape: tuple[int, ...], alignment: float, alpha: float) -> None:
    a, b = random(*shape, seed=1), random(*shape, seed=2)
    expected = reference_matrices.rotate(a.numpy(), b.numpy(), alignment, alpha, 0.8)
    got = merged("rotate", a, b, alignment=alignment, alpha=alpha, centralization=0.8)
    close(got, expected, 1e-7)


@pytest.mark.parametrize("shape", [(), (5,), *SHAPES])
def test_where_rotating_changes_nothing(shape: tuple[int, ...]) -> None:
    a = random(*shape)
    close(merged("rotate", a, a), a)
    close(merged("rotate", a, a, alignment=0.5, alpha=0.5), a)
    close(merged("rotate", a, random(*shape, seed=3), alignment=0.0), a, 0)
    close(merged("rotate", a, torch.zeros_like(a), centralization=0.0), a)
    close(merged("rotate", torch.zeros_like(a), torch.zeros_like(a), alignment=0.5), torch.zeros_like(a))


def test_rotating_keeps_lengths_and_goes_step_by_step() -> None:
    a, b = random(6, 40), random(6, 40, seed=4)
    gram = a @ a.T
    for alignment in (0.3, 1.0, 2.0):
        turned = merged("rotate", a, b, alignment=alignment, centralization=0.0)
        close(turned @ turned.T, gram)
    far = float((merged("rotate", a, b, alignment=1.0, centralization=0.0) - b).norm())
    for alignment in (0.0, 0.3, 0.6):
        assert float((merged("rotate", a, b, alignment=alignment, centralization=0.0) - b).norm()) > far


def test_alpha_may_be_given_per_element() -> None:
    a, b, alpha = random(8, 5), random(8, 5, seed=1), torch.rand(8, 5, dtype=torch.float64)
    models = [sd_mecha.model({"w": t}) for t in (a, b)]
    mask = sd_mecha.model({"w": alpha}, merge_space="param")
    got = sd_mecha.merge(sd_mecha.rotate(*models, alpha=mask), merge_dtype=torch.float64, output_dtype=None)["w"]
    close(got, reference_matrices.rotate(a.numpy(), b.numpy(), 1.0, alpha.numpy()))


def test_rotate_from_a_base_adds_rotated_differences() -> None:
    a, b, c = (random(9, 4, seed=i) for i in range(3))
    models = [sd_mecha.model({"w": t}) for t in (a, b, c)]
    got = sd_mecha.merge(sd_mecha.rotate(*models, alignment=0.5), merge_dtype=torch.float64, output_dtype=None)["w"]
    close(got, c.numpy() + reference_matrices.rotate((a - c).numpy(), (b - c).numpy(), 0.5))


@pytest.mark.parametrize("with_base", [False, True])
def test_a_cache_keeps_rotations_for_other_strengths(with_base: bool) -> None:
    models = [sd_mecha.model({"w": random(9, 4, seed=i)}) for i in range(2 + with_base)]
    options: dict[str, Any] = {"merge_dtype": torch.float64, "output_dtype": None, "threads": 0}
    cache = merge_methods.resolve("rotate").create_cache()
    sd_mecha.merge(sd_mecha.rotate(*models, cache=cache), **options)
    found = cache["w"]["turn"]
    assert isinstance(found, Alignment)
    again = sd_mecha.merge(sd_mecha.rotate(*models, alignment=0.5, alpha=0.3, cache=cache), **options)["w"]
    assert cache["w"]["turn"] is found
    close(again, sd_mecha.merge(sd_mecha.rotate(*models, alignment=0.5, alpha=0.3), **options)["w"], 0)


@given(n=st.integers(1, 8), seed=st.integers(0, 99), power=st.floats(-2, 2))
def test_fractional_powers_compose(n: int, seed: int, power: float) -> None:
    q = rotation(n, seed)
    part, rest = (fractional_orthogonal_matrix_power(q, p) for p in (power, 1 - power))
    close(part @ rest, q, 1e-7)
    close(part.T @ part, torch.eye(n, dtype=torch.float64))


def test_half_turns_have_a_root_too() -> None:
    basis = rotation(6)
    q = basis @ torch.diag(torch.tensor([-1.0, -1, -1, -1, 1, 1], dtype=torch.float64)) @ basis.T
    root = fractional_orthogonal_matrix_power(q, 0.5)
    close(root @ root, q, 1e-7)


@given(rows=SIDES, columns=st.integers(1, 24), seed=st.integers(0, 99))
def test_procrustes_is_orthogonal_and_optimal(rows: int, columns: int, seed: int) -> None:
    x, y = random(rows, columns, seed=seed), random(rows, columns, seed=seed + 100)
    found = procrustes(x, y)
    q = found.map.apply(torch.eye(columns, dtype=torch.float64))
    close(found.apply(x), x @ q, 1e-7)
    close(q.T @ q, torch.eye(columns, dtype=torch.float64))
    best = float(torch.linalg.svdvals(x.T @ y).sum())
    assert abs(float(torch.trace(q.T @ x.T @ y)) - best) < 1e-8 * max(best, 1)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_paths_between_frames(t: float) -> None:
    a = torch.linalg.qr(random(12, 3)).Q
    b = torch.linalg.qr(a + 0.2 * random(12, 3, seed=5)).Q
    point = stiefel_interpolate(a, b, t)
    close(point.T @ point, torch.eye(3, dtype=torch.float64))
    if t in (0, 1):
        close(point, (a, b)[int(t)], 1e-6)


# --- all of them -------------------------------------------------------------------------------------------------

METHODS: dict[str, list[dict[str, Any]]] = {
    "truncate_rank": [{"rank": 2}, {"rank": 2, "use_approximate_basis": False}],
    "truncate_kronecker": [{}, {"kronecker_ratio": 0.3, "use_approximate_basis": False}],
    "rotate": [{"alignment": 0.5, "alpha": 0.5}, {}],
    "get_rank_from_ratio": [{}],
}


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_and_runs_agree(method: str) -> None:
    check_merge_method(merge_methods.resolve(method), examples=METHODS[method], dtypes=(torch.float32, torch.bfloat16))
