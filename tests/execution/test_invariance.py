"""The bytes of a result depend on the recipe and its inputs alone: not on threads, budget or tiles."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sd_mecha
from tests.execution import support
from tests.execution.support import Term, file_bytes, merged, model_term, tensor, tiles

BASELINE = ({"threads": 0, "total_buffer_size": 1 << 28}, (1 << 20, 1 << 22))
RUNS = (
    ({"threads": 0, "total_buffer_size": 0}, (1 << 17, 1 << 22)),
    ({"threads": 1, "total_buffer_size": 1}, (1 << 12, 1 << 13)),
    ({"threads": 2, "total_buffer_size": 64 << 10}, (1 << 13, 1 << 13)),
    ({"threads": 2, "total_buffer_size": 8 << 20}, (3 << 12, 1 << 14)),
    ({"threads": 8, "total_buffer_size": 256 << 20}, (1 << 12, 3 << 12)),
)

SHAPES = st.sampled_from(
    [(), (0,), (0, 3), (1,), (1, 1), (7,), (4095,), (4096,), (4097,), (64, 64), (3, 4096), (33, 65, 5), (300, 999)]
)


@st.composite
def models(draw: st.DrawFn) -> list[Term]:
    """Some models with the same keys and shapes, of any float dtypes."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    out = []
    for i in range(draw(st.integers(2, 4))):
        dtype = draw(st.sampled_from(support.FLOATS))
        out.append(model_term({f"k{j}": tensor(shape, dtype, seed=10 * i + j) for j, shape in enumerate(shapes)}))
    return out


@st.composite
def recipes(draw: st.DrawFn) -> Term:
    """A recipe over such models: streamed reductions over each other, entire tensors in between, shared nodes."""
    weights = list(draw(models()))

    def pick() -> Term:
        return draw(st.sampled_from(weights))

    for _ in range(draw(st.integers(1, 5))):
        match draw(st.integers(0, 8)):
            case 0 | 1:
                term = support.slerp(pick(), pick(), draw(st.sampled_from([0.0, 0.3, 1.0])))
            case 2:
                term = support.weighted_sum(pick(), pick(), draw(st.sampled_from([0.0, 0.3, 1.0])))
            case 3:
                term = support.average(*(pick() for _ in range(draw(st.integers(1, 4)))))
            case 4:
                term = support.perpendicular(pick(), pick())
            case 5:
                deltas = [support.difference(pick(), pick()) for _ in range(draw(st.integers(1, 3)))]
                term = support.plus(pick(), support.ties(*deltas, k=draw(st.sampled_from([0.2, 0.5, 1.0]))))
            case 6:
                term = support.centre(pick())
            case 7:
                term = support.rows(pick())
            case _:
                term = support.half(pick())
        weights.append(term)
    return support.stacked(weights[-1], pick()) if draw(st.booleans()) else weights[-1]


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to rounding; a threshold may fall on the other side for a few elements."""
    assert got.shape == wanted.shape
    far = ~torch.isclose(got.float(), wanted.float(), rtol=2e-2, atol=2e-2, equal_nan=True)
    assert far.sum() <= 2 + got.numel() // 1000


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(term=recipes(), output_dtype=st.sampled_from([None, "float16", "bfloat16", "float32", "float8_e4m3fn"]))
def test_bytes_do_not_depend_on_how_it_is_run(term: Term, output_dtype: str | None, tmp_path: Path) -> None:
    options, tile = BASELINE
    with tiles(*tile):
        wanted = file_bytes(term.node, tmp_path / "out.safetensors", output_dtype=output_dtype, **options)
        plain = merged(term.node, threads=0)
    for key, value in term.values.items():
        assert_near(plain[key], value)
    for options, tile in RUNS:
        with tiles(*tile):
            got = file_bytes(term.node, tmp_path / "out.safetensors", output_dtype=output_dtype, **options)
        assert got == wanted, (options, tile)


def _recipe(name: str, a: Term, b: Term, c: Term) -> Term:
    s = support
    match name:
        case "slerp of slerp":
            return s.slerp(s.slerp(a, b), s.slerp(b, c))
        case "slerp into perpendicular":
            return s.perpendicular(s.slerp(a, b), c)
        case "average of computed":
            return s.average(s.slerp(a, b), s.weighted_sum(b, c), a, s.perpendicular(b, c))
        case "ties":
            return s.plus(a, s.ties(s.difference(b, a), s.difference(c, a), k=0.3))
        case "ties of slerp":
            return s.plus(a, s.ties(s.difference(s.slerp(b, c), a), s.difference(c, a), k=0.3))
        case "whole between":
            return s.weighted_sum(s.slerp(s.centre(s.weighted_sum(a, b)), c), s.centre(c))
        case "rows":
            return s.weighted_sum(s.rows(s.weighted_sum(a, b)), s.slerp(s.rows(b), c))
        case "stack":
            return s.stacked(s.slerp(a, b), c)
        case _:
            return s.weighted_sum(s.half(s.slerp(a, b)), s.half(c))


@pytest.mark.parametrize(
    "name",
    [
        "slerp of slerp",
        "slerp into perpendicular",
        "average of computed",
        "ties",
        "ties of slerp",
        "whole between",
        "rows",
        "stack",
        "cast",
    ],
)
def test_one_large_tensor_shared_by_workers(name: str, tmp_path: Path) -> None:
    a, b, c = (
        model_term({"w": tensor((300, 2000), dtype, seed)})
        for seed, dtype in enumerate((torch.float16, torch.float32, torch.bfloat16))
    )
    term = _recipe(name, a, b, c)
    options, tile = BASELINE
    with tiles(*tile):
        wanted = file_bytes(term.node, tmp_path / "out.safetensors", **options)
    assert_near(merged(term.node)["w"], term.values["w"])
    for options, tile in RUNS:
        with tiles(*tile):
            assert file_bytes(term.node, tmp_path / "out.safetensors", **options) == wanted, (options, tile)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.int16])
@pytest.mark.parametrize("output_dtype", [None, "float16"])
def test_integers_are_copied_exactly_however_it_is_run(dtype: torch.dtype, output_dtype: str | None, tmp_path) -> None:
    top = 2 if dtype is torch.bool else 120 if dtype is torch.uint8 else 2**15 - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, top, (100, 101), generator=generator).to(dtype)
    if dtype is torch.int64:
        ids = ids + 2**60 + 1
    weights = tensor((100, 101))
    a = sd_mecha.model({"ids": ids, "w": weights})
    b = sd_mecha.model({"ids": ids.flip(0), "w": weights.flip(0)})
    for recipe in (sd_mecha.weighted_sum(a, b), sd_mecha.slerp(b, a) | a, sd_mecha.n_average(a, a, b)):
        first = ids.flip(0) if recipe.merge_method.identifier == "fallback" else ids
        outcomes = set()
        for options, tile in (BASELINE, *RUNS):
            with tiles(*tile):
                outcomes.add(file_bytes(recipe, tmp_path / "o.safetensors", output_dtype=output_dtype, **options))
        assert len(outcomes) == 1
        assert torch.equal(merged(recipe)["ids"], first)


@pytest.mark.parametrize("merge_dtype", [None, "float16", "bfloat16", "float64"])
def test_any_merge_dtype(merge_dtype: str | None, tmp_path: Path) -> None:
    dtypes = [*support.FLOATS]
    a = model_term({str(d): tensor((9000,), d, seed=1) for d in dtypes})
    b = model_term({str(d): tensor((9000,), d, seed=2) for d in dtypes})
    term = support.slerp(support.weighted_sum(a, b), b)
    outcomes = set()
    for options, tile in (BASELINE, *RUNS):
        with tiles(*tile):
            path = tmp_path / "o.safetensors"
            outcomes.add(file_bytes(term.node, path, merge_dtype=merge_dtype, output_dtype=None, **options))
    assert len(outcomes) == 1
    got = merged(term.node, merge_dtype=merge_dtype)
    for key, value in term.values.items():
        fp8 = "float8" in key and merge_dtype is None  # fp8 stays fp8 where no dtype is asked for
        tolerance = 0.3 if fp8 else 5e-2
        assert torch.allclose(got[key].float(), value, rtol=tolerance, atol=tolerance)


def test_fallback_with_different_shapes_and_dtypes_per_key(tmp_path: Path) -> None:
    keys = ["first_stage_model.quant_conv.bias", "first_stage_model.post_quant_conv.bias"]
    a = sd_mecha.model({keys[0]: tensor((8,), torch.float16)}, config="sd1-ldm")
    b = sd_mecha.model({k: tensor((8 - 4 * i,), torch.bfloat16, i) for i, k in enumerate(keys)}, config="sd1-ldm")
    recipe = sd_mecha.weighted_sum(a, b) | b
    outcomes = set()
    for (options, tile), dtype in itertools.product((BASELINE, *RUNS), [None]):
        with tiles(*tile):
            outcomes.add(file_bytes(recipe, tmp_path / "o.safetensors", output_dtype=dtype, **options))
    assert len(outcomes) == 1
    got = merged(recipe)
    assert torch.equal(got[keys[1]], tensor((4,), torch.bfloat16, 1))
    assert torch.equal(
        got[keys[0]], torch.lerp(tensor((8,), torch.float16).float(), tensor((8,), torch.bfloat16).float(), 0.5)
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensors_of_one_element_meet_results_of_entire_tensors(shape: tuple[int, ...]) -> None:
    a, b = (model_term({"w": tensor(shape, seed=seed)}) for seed in range(2))
    s = support
    for term in (
        s.average(a, s.centre(b)),
        s.average(s.centre(b), a),
        s.plus(a, s.ties(s.difference(a, b), s.difference(s.rows(s.centre(b)), a), k=0.5)),
        s.rows(s.slerp(s.centre(a), b)),
    ):
        assert_near(merged(term.node)["w"], term.values["w"])
