"""Inputs that turn out not to exist while merging: tensors with NaN, and keys that methods skip."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sd_mecha
from sd_mecha.errors import EmptyMergeError
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, skip_key
from sd_mecha.extensions.model_configs import KeyMetadata, ModelComponent, ModelConfigImpl
from tests.execution.support import centred, make, merged, tensor, tiles

N = 40_000
LAST = N - 1

RUNS = [
    pytest.param({"threads": 0}, (1 << 20, 1 << 22), id="one tile"),
    pytest.param({"threads": 0, "total_buffer_size": 1}, (1 << 12, 1 << 22), id="tiles"),
    pytest.param({"threads": 3}, (1 << 12, 1 << 12), id="shared"),
]


def spoilt(at: int = LAST, seed: int = 0, value: float = float("nan"), dtype: torch.dtype = torch.float32) -> Tensor:
    x = tensor((N,), dtype, seed)
    x[at] = value
    return x


def good(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor((N,), dtype, seed)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize(("options", "tile"), RUNS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 2 * 4096 + 1, LAST])
def test_a_tensor_with_nan_is_left_out_and_said_so(
    options: dict[str, int], tile: tuple[int, int], value: float, at: int, tmp_path: Path, caplog: Any
) -> None:
    a = {"first": good(1), "bad": spoilt(at, value=value), "last": good(2)}
    b = {"first": good(3), "bad": good(4), "last": good(5)}
    files = []
    for name, state in (("a", a), ("b", b)):
        files.append(tmp_path / f"{name}.safetensors")
        sd_mecha.merge(sd_mecha.model(state), output=files[-1], output_dtype=None, omit_non_finite_inputs=False)
    out = tmp_path / "out.safetensors"
    whole = merged(sd_mecha.slerp(sd_mecha.model(a), sd_mecha.model(b)))
    caplog.clear()
    with tiles(*tile):
        sd_mecha.merge(sd_mecha.slerp(*map(sd_mecha.model, map(str, files))), output=out, **options)
    result = load_file(out)
    assert result.keys() == {"first", "last"}
    for key, got in result.items():
        assert torch.equal(got, whole[key].half())
    payload = sum(t.nbytes for t in result.values())
    data = out.read_bytes()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + payload  # no gap is left
    [message] = warnings_of(caplog)
    assert str(files[0]) in message
    assert "'bad'" in message
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("options", "tile"), RUNS)
@pytest.mark.parametrize(
    "combine",
    [
        pytest.param(lambda x, y: sd_mecha.weighted_sum(x, y), id="elementwise"),
        pytest.param(lambda x, y: sd_mecha.slerp(x, y), id="streamed"),
        pytest.param(lambda x, y: sd_mecha.n_average(x, y), id="deferred"),
        pytest.param(lambda x, y: sd_mecha.weighted_sum(centred(x), y), id="whole"),
        pytest.param(lambda x, y: y + sd_mecha.ties_sum(x - y, k=0.3), id="ties"),
    ],
)
def test_a_fallback_takes_its_place_at_the_root(
    options: Any, tile: Any, combine: Any, tmp_path: Path, caplog: Any
) -> None:
    x = sd_mecha.model({"w": spoilt(), "v": good(1)})
    y = sd_mecha.model({"w": good(2), "v": good(3)})
    recipe = combine(x, y)
    with tiles(*tile):
        got = merged(recipe, fallback_model=y, **options)
        again = merged(recipe | y, **options)
    assert torch.equal(got["w"], good(2))
    assert torch.equal(got["v"], merged(recipe)["v"])
    assert all(torch.equal(got[k], again[k]) for k in got)
    assert "another source takes its place" in warnings_of(caplog)[0]


@pytest.mark.parametrize(("options", "tile"), RUNS)
def test_a_fallback_takes_its_place_deep_in_the_recipe(options: Any, tile: Any, caplog: Any) -> None:
    x = sd_mecha.model({"w": spoilt(), "v": good(1)})
    y = sd_mecha.model({"w": good(2), "v": good(3)})
    z = sd_mecha.model({"w": good(4), "v": good(5)})
    with tiles(*tile):
        got = merged(sd_mecha.slerp(centred(x | y), sd_mecha.weighted_sum(x | z, y)), **options)
        wanted = merged(sd_mecha.slerp(centred(y), sd_mecha.weighted_sum(z, y)), **options)
    assert torch.equal(got["w"], wanted["w"])
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(("options", "tile"), RUNS)
def test_several_sources_in_a_row_may_be_missing(options: Any, tile: Any, caplog: Any) -> None:
    bad = [sd_mecha.model({"w": spoilt(i * 4096, seed=i), "v": good(i)}) for i in range(3)]
    y = sd_mecha.model({"w": good(2), "v": good(3)})
    with tiles(*tile):
        got = merged(bad[0] | bad[1] | bad[2] | y, **options)
    assert torch.equal(got["w"], good(2))
    assert len(warnings_of(caplog)) == 3
    with tiles(*tile):
        assert merged(bad[0] | bad[1] | bad[2], **options).keys() == {"v"}


@pytest.mark.parametrize(("options", "tile"), RUNS)
def test_a_group_without_one_of_its_inputs(options: Any, tile: Any) -> None:
    class swap:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["p", "q"] = builder.keys["p"] & builder.keys["q"]
            builder["r"] = builder.keys["r"]

        def __call__(self, a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(StateDict[Tensor]):
            if kwargs["key_relation"].outputs == ("r",):
                return {"r": a["r"]}
            return {"p": a["q"] * 1, "q": a["p"] * 2}

    x = sd_mecha.model({"p": good(1), "q": spoilt(), "r": good(3)})
    y = sd_mecha.model({"p": good(4), "q": good(5), "r": good(6)})
    node = make()(swap)(x)
    with tiles(*tile):
        assert merged(node, **options).keys() == {"r"}
        got = merged(sd_mecha.weighted_sum(node, y) | y, **options)
        deep = merged(sd_mecha.slerp(node | y, y), **options)
    assert torch.equal(got["p"], good(4))
    assert torch.equal(got["q"], good(5))
    assert torch.allclose(got["r"], torch.lerp(good(3), good(6), 0.5))
    assert torch.allclose(deep["p"], good(4), atol=1e-5)


def test_a_group_that_finds_another_way(caplog: Any) -> None:
    class best:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["p", "q"] = (builder.keys["p"] & builder.keys["q"]) | builder.keys["r"]
            builder["r"] = builder.keys["r"]

        def __call__(self, a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(StateDict[Tensor]):
            used = [k for keys in kwargs["key_relation"].inputs.values() for k in keys]
            return {k: a[used[0]] * len(used) for k in kwargs["key_relation"].outputs}

    got = merged(make()(best)(sd_mecha.model({"p": good(1), "q": spoilt(), "r": good(3)})))
    assert torch.equal(got["p"], good(3))
    assert torch.equal(got["q"], good(3))


def test_a_tensor_that_the_file_knows_by_an_alias(tmp_path: Path, caplog: Any) -> None:
    component = ModelComponent(
        {"w": KeyMetadata((N,), "float32", aliases=("old.w",)), "v": KeyMetadata((N,), "float32")}
    )
    config = ModelConfigImpl("aliased-test", {"all": component})
    a = sd_mecha.model({"old.w": spoilt(), "v": good(1)}, config=config)
    b = sd_mecha.model({"w": good(2), "v": good(3)}, config=config)
    assert torch.equal(merged(sd_mecha.weighted_sum(a, b) | b)["w"], good(2))
    assert "'old.w'" in warnings_of(caplog)[0]
    assert merged(sd_mecha.weighted_sum(a, b)).keys() == {"v"}


@pytest.mark.parametrize("threads", [0, 2])
def test_what_takes_its_place_is_written_in_the_dtype_of_the_layout(threads: int, tmp_path: Path) -> None:
    a = sd_mecha.model({"w": spoilt(), "v": good(1)})
    b = sd_mecha.model({"w": good(2, torch.float16), "v": good(3)})
    out = tmp_path / "out.safetensors"
    sd_mecha.merge(a | b, output=out, merge_dtype=None, output_dtype=None, threads=threads)
    got = load_file(out)
    assert got["w"].dtype == torch.float32
    assert torch.equal(got["w"], good(2, torch.float16).float())
    a, b = sd_mecha.model({"w": spoilt(dtype=torch.float16)}), sd_mecha.model({"w": good(2)})
    got = merged(a | b, merge_dtype=None, threads=threads)
    assert torch.equal(got["w"], good(2).half())


def test_a_replacement_of_another_shape_is_refused() -> None:
    @make
    def first_half(a: Parameter(Tensor)) -> Return(Tensor):
        return a[: a.shape[0] // 2] * 1

    a = sd_mecha.model({"w": spoilt()})
    b = sd_mecha.model({"w": good(1)})
    with pytest.raises(sd_mecha.errors.ShapeError, match=r"'w'.*20000"):
        merged(first_half(a) | b)


def test_nothing_is_left_out_when_asked_not_to(caplog: Any) -> None:
    a = sd_mecha.model({"w": spoilt(), "v": good(1)})
    b = sd_mecha.model({"w": good(2), "v": good(3)})
    got = merged(sd_mecha.weighted_sum(a, b), omit_non_finite_inputs=False, total_buffer_size=1, threads=3)
    assert torch.isnan(got["w"]).sum() == 1
    assert warnings_of(caplog) == ["the result at key 'w' holds inf or nan"]
    caplog.clear()
    merged(sd_mecha.weighted_sum(a, b), omit_non_finite_inputs=False, check_finite_output=False)
    assert warnings_of(caplog) == []


def test_results_that_overflow_are_told_of_once_for_each_key(caplog: Any) -> None:
    large = {k: torch.full((N,), 60000.0) for k in ("x", "y")} | {"z": good()}
    a = sd_mecha.model(large)
    with tiles(1 << 12, 1 << 12):
        got = sd_mecha.merge(a + (a - sd_mecha.model({k: good() for k in large})), threads=4, output_dtype="float16")
    assert torch.isinf(got["x"]).all()
    assert sorted(warnings_of(caplog)) == [f"the result at key {k!r} holds inf or nan" for k in "xy"]


def test_all_inputs_missing_gives_an_empty_result(tmp_path: Path, caplog: Any) -> None:
    out = tmp_path / "out.safetensors"
    sd_mecha.merge(sd_mecha.n_average(sd_mecha.model({"w": spoilt()})), output=out)
    assert load_file(out) == {}
    assert "left out" in warnings_of(caplog)[0]


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_stream_leaves_missing_keys_out(threads: int) -> None:
    a = sd_mecha.model({"a": good(1), "w": spoilt(), "z": good(2)})
    with tiles(1 << 12, 1 << 12):
        got = dict(sd_mecha.stream(sd_mecha.n_average(a), threads=threads, output_dtype=None))
    assert got.keys() == {"a", "z"}
    assert torch.equal(got["z"], good(2))


# --- keys that methods skip ------------------------------------------------------------------------------------------


def skipping(tiling: str, streamed: bool = False) -> Any:
    """Skips tensors that hold a large value: to be seen in the one tile that holds it."""
    if streamed:

        @make(tiling=tiling, identifier="picky")
        def picky(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
            square = yield sd_mecha.extensions.reductions.Dot(a, a)
            if not a.is_meta and a.abs().max() > 100:
                skip_key(kwargs["key"])
            return a * (square / square)
    else:

        @make(tiling=tiling, identifier="picky")
        def picky(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
            if not a.is_meta and a.abs().max() > 100:
                skip_key(kwargs["key"])
            return a * 1

    return picky


@pytest.mark.parametrize(("options", "tile"), RUNS)
@pytest.mark.parametrize(("tiling", "streamed"), [("whole", False), ("elementwise", False), ("elementwise", True)])
@pytest.mark.parametrize("at", [0, 2 * 4096 + 5, LAST])
def test_a_method_may_skip_a_key_for_what_it_finds(
    options: Any, tile: Any, tiling: str, streamed: bool, at: int, caplog: Any
) -> None:
    picky = skipping(tiling, streamed)
    a = sd_mecha.model({"w": spoilt(at, value=1000.0), "v": good(1)})
    b = sd_mecha.model({"w": good(2), "v": good(3)})
    with tiles(*tile):
        assert merged(picky(a), **options).keys() == {"v"}
        got = merged(sd_mecha.weighted_sum(picky(a) | b, b, alpha=0.0), **options)
    assert torch.equal(got["w"], good(2))
    assert torch.allclose(got["v"], good(1))
    assert warnings_of(caplog) == []  # it does so on purpose


@pytest.mark.parametrize(("tiling", "streamed"), [("whole", False), ("elementwise", False), ("elementwise", True)])
def test_a_method_may_skip_a_key_for_its_name(tiling: str, streamed: bool) -> None:
    def body(key: str) -> None:
        if key.endswith("bias"):
            skip_key(key)

    if streamed:

        @make(tiling=tiling)
        def weights_only(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
            body(kwargs["key"])
            total = yield sd_mecha.extensions.reductions.Sum(a)
            return a * 2 + 0 * total.to(a)
    else:

        @make(tiling=tiling)
        def weights_only(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
            body(kwargs["key"])
            return a * 2

    keys = ["0.bias", "1.weight", "2.bias", "3.weight"]
    a = sd_mecha.model({k: good(i) for i, k in enumerate(keys)})
    b = sd_mecha.model({k: good(i + 9) for i, k in enumerate(keys)})
    assert merged(weights_only(a)).keys() == {"1.weight", "3.weight"}
    got = merged(weights_only(a) | b)
    for i, key in enumerate(keys):
        assert torch.equal(got[key], good(i + 9) if key.endswith("bias") else 2 * good(i))
    deep = merged(sd_mecha.weighted_sum(b, weights_only(a) | b, alpha=1.0))
    assert all(torch.equal(got[k], deep[k]) for k in keys)


def test_a_method_may_skip_a_group() -> None:
    class pair:
        @staticmethod
        def map_keys(builder: Any) -> None:
            builder["p", "q"] = builder.keys["p"] & builder.keys["q"]
            builder["r"] = builder.keys["r"]

        def __call__(self, a: Parameter(StateDict[Tensor]), **kwargs: Any) -> Return(StateDict[Tensor]):
            if "p" in kwargs["key_relation"].outputs:
                skip_key("p")
            return {"r": a["r"] * 2}

    values = {"p": good(1), "q": good(2), "r": good(3)}
    node = make()(pair)(sd_mecha.model(values))
    assert merged(node).keys() == {"r"}
    got = merged(node | sd_mecha.model(values))
    assert torch.equal(got["q"], good(2))


def test_all_keys_skipped_gives_an_empty_result() -> None:
    @make
    def nothing(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        skip_key(kwargs["key"])
        return a

    m = sd_mecha.model({"w": good()})
    assert merged(nothing(m)) == {}
    assert torch.equal(merged(nothing(m), fallback_model=m)["w"], good())
    with pytest.raises(EmptyMergeError):
        merged(sd_mecha.weighted_sum(m, sd_mecha.model({"other": good()})))
