"""Plans: made from headers alone, explained in words, small however large the recipe is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.errors import ConfigError, EmptyMergeError, MergeSpaceError, PlanError, ShapeError
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict
from sd_mecha.extensions.model_configs import ModelConfigImpl
from sd_mecha.planning.program import Tiles
from sd_mecha.storage.memory import MemoryReader
from sd_mecha.storage.safetensors import SafetensorsReader
from tests.execution.support import centred, make, merged, tensor, unit_rows


def saved(path: Path, state: dict[str, Tensor]) -> Any:
    sd_mecha.merge(sd_mecha.model(state), output=path, merge_dtype=None, output_dtype=None)
    return sd_mecha.model(str(path))


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, name: str, start: int, buffer: memoryview) -> None:
        raise AssertionError("planning reads headers only")

    for reader in (SafetensorsReader, MemoryReader):
        monkeypatch.setattr(reader, "read_into", refuse)


# --- what a plan says ------------------------------------------------------------------------------------------------


def test_a_plan_is_explained(tmp_path: Path) -> None:
    state = {"conv.weight": tensor((64, 64, 3, 3)), "conv.bias": tensor((64,)), "ids": torch.arange(64)}
    a, b = saved(tmp_path / "a.safetensors", state), saved(tmp_path / "b.safetensors", state)
    recipe = sd_mecha.weighted_sum(sd_mecha.slerp(a, b), centred(unit_rows(b)), alpha=0.25)
    with sd_mecha.plan(recipe, output_dtype="bfloat16") as plan:
        text = str(plan)
    lines = text.splitlines()
    for name in ("a.safetensors", "b.safetensors"):
        [line] = [x for x in lines if x.strip().startswith(str(tmp_path / name))]
        assert "3 keys" in line
    assert any("output" in x and "3 keys" in x and "bfloat16" in x for x in lines)
    assert any(x.startswith("peak memory") for x in lines)
    assert any("tiles" in x and "slerp" in x and "streamed reduction" in x for x in lines)
    assert any("whole" in x and "centred sees entire tensors" in x for x in lines)
    assert any("tiles" in x and "weighted_sum" in x and "0.25" in x and "elementwise" in x for x in lines)
    assert any("copied bit for bit" in x for x in lines)
    assert any("write bfloat16" in x for x in lines)
    assert any("read" in x and "float32" in x for x in lines)


def test_why_a_promise_does_not_help(tmp_path: Path) -> None:
    @make(tiling="elementwise")
    def shift(a: Parameter(Tensor), by: Parameter(Tensor, "param")) -> Return(Tensor):
        return a + by

    a = sd_mecha.model({"w": tensor((4, 6))})
    by = sd_mecha.model({"w": tensor((1, 6))}, merge_space="param")
    with sd_mecha.plan(shift(a, by)) as plan:
        assert "broadcasts shape (1, 6) to (4, 6)" in str(plan)
    assert torch.equal(merged(shift(a, by))["w"], tensor((4, 6)) + tensor((1, 6)))
    with sd_mecha.plan(unit_rows(sd_mecha.model({"w": tensor((9,))}))) as plan:
        assert "does not cut into rows" in str(plan)


def test_long_plans_are_shortened() -> None:
    many = sd_mecha.n_average(*(sd_mecha.model({"w": tensor((3,), seed=i)}) for i in range(100)))
    for i in range(40):
        many = sd_mecha.weighted_sum(many, sd_mecha.model({"w": tensor((3,), seed=i)}))
    with sd_mecha.plan(many) as plan:
        text = str(plan)
    assert len(text.splitlines()) < 60
    assert len(text) < 6000
    assert "100 inputs" in text or "more steps" in text


def test_bytes_are_counted(tmp_path: Path) -> None:
    state = {"x": tensor((1000,), torch.float16), "y": tensor((10, 20))}
    a, b = (saved(tmp_path / f"{n}.safetensors", state) for n in "ab")
    size = 1000 * 2 + 200 * 4
    with sd_mecha.plan(sd_mecha.weighted_sum(a, b), output_dtype="float64") as plan:
        assert plan.bytes_read == 2 * size
        assert plan.bytes_written == 1200 * 8
        assert plan.keys == 2
    with sd_mecha.plan(sd_mecha.slerp(a, sd_mecha.weighted_sum(a, b))) as plan:
        assert plan.bytes_read == 2 * size  # a is read once, though two steps need it
        assert plan.bytes_written == 1200 * 2
    with sd_mecha.plan(sd_mecha.n_average(a), output_dtype=None) as plan:
        assert plan.bytes_read == size


def test_memory_does_not_grow_with_models_or_their_size() -> None:
    def peak(recipe: Any) -> int:
        with sd_mecha.plan(recipe) as plan:
            return plan.peak_memory

    small, large = sd_mecha.model({"w": tensor((10,))}), sd_mecha.model({"w": torch.zeros(1).expand(1 << 30)})
    assert peak(sd_mecha.weighted_sum(small, small)) == peak(sd_mecha.slerp(large, large))
    assert peak(sd_mecha.n_average(*[large] * 50)) == peak(large)
    assert peak(centred(large)) >= 2 * 4 << 30


# --- headers only ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_reading")
def test_planning_reads_no_tensor() -> None:
    class swap:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["x", "y"] = builder.keys["x"] & builder.keys["y"]

        def __call__(self, a: Parameter(StateDict[Tensor])) -> Return(StateDict[Tensor]):
            return {"x": a["y"] * 1, "y": a["x"] * 1}

    @make
    def looks_at_values(a: Parameter(Tensor)) -> Return(Tensor):
        return a * a.max().item()

    m = sd_mecha.model({"x": tensor((5000,)), "y": tensor((5000,), torch.int64)})
    t = sd_mecha.literal({"x": tensor((5000,)), "y": tensor((5000,))}, merge_space="weight")
    for recipe in (
        sd_mecha.slerp(m, m) | m,
        m + sd_mecha.ties_sum(m - m, k=0.5),
        make()(swap)(m),
        looks_at_values(m),
        sd_mecha.weighted_sum(m, t),
        sd_mecha.cast(m, dtype=sd_mecha.get_dtype(m)),
        sd_mecha.stack(m, centred(m)),
        sd_mecha.omit_non_finite(m),
    ):
        with sd_mecha.plan(recipe) as plan:
            assert plan.outputs[0].keys() == {"x", "y"}
            assert str(plan)


def test_equal_keys_share_a_template() -> None:
    shapes = [(64,), (64, 64), (3, 3)]
    state = {f"k{i}": torch.zeros(shapes[i % 3]) for i in range(300)}
    a, b = sd_mecha.model(state), sd_mecha.model(dict(state))
    for recipe in (
        sd_mecha.weighted_sum(a, b),
        sd_mecha.slerp(a, centred(b)),
        a + sd_mecha.ties_sum(b - a, k=0.5),
        sd_mecha.weighted_sum(a, b, alpha=dict.fromkeys(state, 0.5)),
    ):
        with sd_mecha.plan(recipe) as plan:
            assert len(plan.templates) == 3
            assert len(plan.programs) == 300
    alphas = {k: 0.25 * (i // 150) for i, k in enumerate(state)}
    with sd_mecha.plan(sd_mecha.weighted_sum(a, b, alpha=alphas)) as plan:
        assert len(plan.templates) == 6
    got = merged(sd_mecha.weighted_sum(a, sd_mecha.model({k: v + 1 for k, v in state.items()}), alpha=alphas))
    assert all((got[k] == alphas[k]).all() for k in state)


def test_keys_are_written_in_the_order_of_the_first_model(tmp_path: Path) -> None:
    names = ["z", "a", "m", "b"]
    a = sd_mecha.model({k: tensor((4,)) for k in names})
    b = sd_mecha.model({k: tensor((4,)) for k in sorted(names)})
    with sd_mecha.plan(sd_mecha.n_average(a, b)) as plan:
        assert list(plan.outputs[0]) == names
        assert [p.key for p in plan.programs] == names


def test_state_dicts_read_one_model_at_a_time() -> None:
    models = [sd_mecha.model({"w": tensor((9000,), seed=i)}) for i in range(5)]
    with sd_mecha.plan(sd_mecha.n_average(*models)) as plan:
        [stage] = plan.templates[0].stages
    assert isinstance(stage, Tiles)
    assert len(stage.deferred) == 5
    assert stage.element_bytes < 5 * 4


# --- contradictions --------------------------------------------------------------------------------------------------


def test_shapes_that_differ_are_told_together_with_both_files(tmp_path: Path) -> None:
    shapes = {"w": ((6, 4), (4, 6)), "v": ((6, 4), (1, 4)), "fine": ((3,), (3,)), "u": ((2,), (3,))}
    a, b = (
        saved(tmp_path / f"{n}.safetensors", {k: tensor(s[i]) for k, s in shapes.items()}) for i, n in enumerate("ab")
    )
    for combine in (sd_mecha.weighted_sum, sd_mecha.slerp, sd_mecha.n_average):
        recipe = sd_mecha.weighted_sum(a, centred(combine(a, b)))
        with pytest.raises(ShapeError) as caught:
            sd_mecha.plan(recipe)
        text = str(caught.value)
        for key in ("w", "v", "u"):
            [line] = [x for x in caught.value.problems if f"'{key}'" in x]
            for i, name in enumerate("ab"):
                assert str(tmp_path / f"{name}.safetensors") in line
                assert str(shapes[key][i]) in line
        assert "'fine'" not in text
        assert combine.identifier in text


def test_an_entire_tensor_method_that_refuses_shapes() -> None:
    @make(identifier="product")
    def product(a: Parameter(Tensor), b: Parameter(Tensor)) -> Return(Tensor):
        return a @ b

    a, b = sd_mecha.model({"w": tensor((2, 3))}), sd_mecha.model({"w": tensor((2, 3))})
    with pytest.raises(ShapeError, match=r"'w'.*product"):
        sd_mecha.plan(product(a, b))


def test_many_problems_are_cut_short() -> None:
    a = sd_mecha.model({f"k{i}": tensor((2, i + 1)) for i in range(100)})
    b = sd_mecha.model({f"k{i}": tensor((3, i + 1)) for i in range(100)})
    with pytest.raises(ShapeError) as caught:
        sd_mecha.plan(sd_mecha.weighted_sum(a, b))
    assert len(caught.value.problems) < 30
    assert "more" in caught.value.problems[-1]


def test_merge_spaces_and_configs_are_told_together() -> None:
    known = {"first_stage_model.quant_conv.bias": tensor((8,))}
    a = sd_mecha.model(known, config="sd1-ldm")
    b = sd_mecha.model(known, config="sd1-ldm", merge_space="delta")
    with pytest.raises(MergeSpaceError, match="weighted_sum"):
        sd_mecha.plan(sd_mecha.weighted_sum(a, b))
    config = ModelConfigImpl("other-test", {"all": {"x": {}}})
    other = sd_mecha.model({"x": tensor((8,))}, config=config, merge_space="delta")
    with pytest.raises(PlanError) as caught:
        sd_mecha.plan(sd_mecha.weighted_sum(a, other))
    assert "other-test" in str(caught.value)
    assert "delta" in str(caught.value)
    with pytest.raises(ConfigError):
        sd_mecha.plan(sd_mecha.weighted_sum(a, sd_mecha.model(known, config=config)))


def test_nothing_to_merge_is_told_with_the_inputs() -> None:
    a, b = sd_mecha.model({"x": tensor((2,))}), sd_mecha.model({"y": tensor((2,))})
    with pytest.raises(EmptyMergeError, match="allow_empty_merge"):
        sd_mecha.plan(sd_mecha.weighted_sum(a, b))
    assert merged(sd_mecha.weighted_sum(a, b), allow_empty_merge=True) == {}


def test_a_closed_plan_and_a_failed_one_leave_no_file_open(tmp_path: Path) -> None:
    import psutil

    a = saved(tmp_path / "a.safetensors", {"w": tensor((2, 3))})
    b = saved(tmp_path / "b.safetensors", {"w": tensor((3, 2))})

    def still_open() -> list[str]:
        return [f.path for f in psutil.Process().open_files() if str(tmp_path) in f.path]

    with sd_mecha.plan(sd_mecha.weighted_sum(a, a)):
        pass
    assert still_open() == []
    with pytest.raises(ShapeError):
        sd_mecha.plan(sd_mecha.weighted_sum(a, b))
    assert still_open() == []


# --- large recipes ---------------------------------------------------------------------------------------------------


def test_a_ladder_of_64_levels() -> None:
    node = sd_mecha.model({"w": tensor((5000,))})
    for _ in range(64):
        node = sd_mecha.weighted_sum(node, node)
    with sd_mecha.plan(node) as plan:
        assert sum(len(t.steps) for t in plan.templates) <= 66
        assert len(str(plan)) < 10_000
    assert torch.equal(merged(node)["w"], tensor((5000,)))


def test_a_chain_can_be_planned_and_merged() -> None:
    m, other = sd_mecha.model({"w": torch.zeros(4)}), sd_mecha.model({"w": torch.ones(4)})
    node = m
    for _ in range(5000):
        node = sd_mecha.add_difference(node, other - m, alpha=0.001)
    with sd_mecha.plan(node) as plan:
        assert plan.keys == 1
    assert torch.allclose(merged(node)["w"], torch.full((4,), 5.0), rtol=1e-3)


@pytest.mark.slow
def test_a_chain_of_100_000_can_be_planned_and_merged() -> None:
    node = sd_mecha.model({"w": torch.zeros(4), "v": torch.zeros(3)})
    other = sd_mecha.model({"w": torch.ones(4), "v": torch.ones(3)})
    for _ in range(100_000):
        node = sd_mecha.weighted_sum(node, other, alpha=0.001)
    with sd_mecha.plan(node) as plan:
        assert plan.keys == 2
        assert len(str(plan)) < 10_000
    got = merged(node)
    assert torch.allclose(got["w"], torch.ones(4), atol=1e-2)


def test_an_average_of_many_models() -> None:
    models = [sd_mecha.model({"w": torch.full((3,), float(i))}) for i in range(1000)]
    assert torch.allclose(merged(sd_mecha.n_average(*models))["w"], torch.full((3,), 499.5))


@pytest.mark.slow
def test_an_average_of_10_000_models() -> None:
    models = [sd_mecha.model({"w": torch.full((3,), float(i))}) for i in range(10_000)]
    recipe = sd_mecha.n_average(*models)
    with sd_mecha.plan(recipe) as plan:
        assert len(str(plan)) < 10_000
    assert torch.allclose(merged(recipe)["w"], torch.full((3,), 4999.5))


@pytest.mark.slow
def test_every_input_of_a_large_model_may_be_missing() -> None:
    """A model full of NaN is no trap, though every key of it is planned again."""
    keys = [f"k{i}" for i in range(1000)]
    bad = sd_mecha.model({k: torch.full((4,), float("nan")) for k in keys})
    good = sd_mecha.model({k: torch.ones(4) for k in keys})
    got = merged(sd_mecha.weighted_sum(bad, good) | good, threads=0)
    assert len(got) == 1000
    assert all((value == 1).all() for value in got.values())
