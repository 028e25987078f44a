"""Where results go: files and mappings, several at once, streams, defaults."""

from __future__ import annotations

import collections
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sd_mecha
from sd_mecha.errors import OptionError, PlanError
from sd_mecha.extensions.merge_methods import Parameter, Return
from sd_mecha.storage.memory import MemoryReader
from sd_mecha.storage.safetensors import SafetensorsReader
from tests.execution.support import centred, counted_reads, make, merged, tensor, tensors, threads_alive, tiles

KEYS = [f"block.{i}" for i in range(12)]


def state(seed: int = 0, numel: int = 3000, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {k: tensor((numel,), dtype, 100 * seed + i) for i, k in enumerate(KEYS)}


def file_of(path: Path, seed: int, **options: Any) -> Any:
    sd_mecha.merge(sd_mecha.model(state(seed, **options)), output=path, output_dtype=None, merge_dtype=None)
    return sd_mecha.model(str(path))


class Failure(Exception):
    pass


@make
def failing(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
    if kwargs["key"] == KEYS[7] and not a.is_meta:
        raise Failure("on purpose")
    return a * 1


# --- several recipes at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_merge_many_equals_separate_merges_and_reads_once(threads: int, tmp_path: Path) -> None:
    a, b, c = (file_of(tmp_path / f"{n}.safetensors", i) for i, n in enumerate("abc"))
    recipes = {
        tmp_path / "sum.safetensors": sd_mecha.weighted_sum(a, b),
        tmp_path / "avg.safetensors": sd_mecha.n_average(a, b, c),
        tmp_path / "add.safetensors": a + (b - c),
        tmp_path / "copy.safetensors": c,
    }
    alone = {}
    for path, recipe in recipes.items():
        sd_mecha.merge(recipe, output=path, threads=threads)
        alone[path] = path.read_bytes()
        path.unlink()
    with counted_reads(SafetensorsReader) as counts:
        sd_mecha.merge_many(recipes, threads=threads)
    assert {path: path.read_bytes() for path in recipes} == alone
    assert counts == dict.fromkeys(KEYS, 3 * 3000 * 2)
    assert not list(tmp_path.glob(".*"))


def test_merge_many_with_streamed_and_entire_steps(tmp_path: Path) -> None:
    a, b = (file_of(tmp_path / f"{n}.safetensors", i, numel=30_000) for i, n in enumerate("ab"))
    shared = sd_mecha.slerp(a, b)
    recipes = {
        tmp_path / "1.safetensors": shared,
        tmp_path / "2.safetensors": sd_mecha.slerp(shared, centred(shared)),
        tmp_path / "3.safetensors": centred(b),
        tmp_path / "4.safetensors": sd_mecha.stack(shared, a),
    }
    alone = {}
    for path, recipe in recipes.items():
        sd_mecha.merge(recipe, output=path)
        alone[path] = path.read_bytes()
    with tiles(1 << 12, 1 << 13):
        sd_mecha.merge_many(recipes, threads=3)
    assert {path: path.read_bytes() for path in recipes} == alone


def test_merge_many_of_different_models(tmp_path: Path) -> None:
    a = file_of(tmp_path / "a.safetensors", 0)
    other = sd_mecha.model({"x": tensor((5,))})
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    sd_mecha.merge_many({one: sd_mecha.n_average(a), two: sd_mecha.n_average(other)}, output_dtype="float32")
    assert load_file(one).keys() == set(KEYS)
    assert torch.equal(load_file(two)["x"], tensor((5,)))


@pytest.mark.parametrize("threads", [0, 2])
def test_when_one_of_many_fails_none_appears(threads: int, tmp_path: Path) -> None:
    a = file_of(tmp_path / "a.safetensors", 0)
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"before")
    recipes = {old: sd_mecha.n_average(a), tmp_path / "new.safetensors": failing(a)}
    with pytest.raises(Failure):
        sd_mecha.merge_many(recipes, threads=threads)
    with pytest.raises(PlanError):
        sd_mecha.merge_many({old: a, tmp_path / "new.safetensors": sd_mecha.weighted_sum(a, a - a)})
    assert old.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "old.safetensors"]


def test_merge_many_refuses_what_it_cannot_mean(tmp_path: Path) -> None:
    m = sd_mecha.model(state())
    with pytest.raises(OptionError, match="output"):
        sd_mecha.merge_many({"a.safetensors": m}, output="x")
    twice = {tmp_path / "a.safetensors": m, str(tmp_path / "." / "a.safetensors"): m}
    with pytest.raises(OptionError, match=r"a\.safetensors"):
        sd_mecha.merge_many(twice)
    sd_mecha.merge_many({})


def test_merge_many_may_replace_its_inputs(tmp_path: Path) -> None:
    a, b = (file_of(tmp_path / f"{n}.safetensors", i) for i, n in enumerate("ab"))
    swapped = {tmp_path / "a.safetensors": sd_mecha.n_average(b), tmp_path / "b.safetensors": sd_mecha.n_average(a)}
    sd_mecha.merge_many(swapped)
    assert torch.equal(load_file(tmp_path / "a.safetensors")[KEYS[3]], state(1)[KEYS[3]])
    assert torch.equal(load_file(tmp_path / "b.safetensors")[KEYS[3]], state(0)[KEYS[3]])


def test_recipes_that_are_merged_together_do_not_change_each_other(tmp_path: Path) -> None:
    values = [{"ids": torch.tensor([2**40 + i, i]), "w": tensor((6,), torch.float16, i)} for i in range(2)]
    a, b = map(sd_mecha.model, values)
    recipes = {
        tmp_path / "cast.safetensors": sd_mecha.weighted_sum(a, b).to(dtype="float64"),
        tmp_path / "sum.safetensors": sd_mecha.weighted_sum(a, b),
        tmp_path / "copy.safetensors": a,
    }
    alone = {}
    for path, recipe in recipes.items():
        sd_mecha.merge(recipe, output=path, output_dtype=None)
        alone[path] = path.read_bytes()
    sd_mecha.merge_many(recipes, output_dtype=None)
    assert {path: path.read_bytes() for path in recipes} == alone
    assert torch.equal(load_file(tmp_path / "sum.safetensors")["ids"], values[0]["ids"])


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_a_stream_yields_every_key_once(threads: int) -> None:
    a, b = sd_mecha.model(state(0)), sd_mecha.model(state(1))
    recipe = sd_mecha.slerp(a, b)
    wanted = merged(recipe)
    pairs = list(sd_mecha.stream(recipe, threads=threads, output_dtype=None))
    assert collections.Counter(k for k, _ in pairs) == dict.fromkeys(KEYS, 1)
    assert all(torch.equal(value, wanted[key]) for key, value in pairs)
    assert threads_alive() == set()


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_stream_that_is_closed_early_leaves_no_thread(threads: int, taken: int) -> None:
    stream = sd_mecha.stream(sd_mecha.n_average(sd_mecha.model(state())), threads=threads)
    for _ in range(taken):
        next(stream)
    stream.close()
    assert threads_alive() == set()


def test_a_stream_stops_its_workers_before_it_closes_the_models() -> None:
    """A worker that still reads must not find its model closed."""
    started, go_on = threading.Event(), threading.Event()
    outcomes: list[str] = []

    @make(tiling="elementwise")
    def slow(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        if a.numel() > 1 and kwargs["key"] == KEYS[-1]:
            started.set()
            go_on.wait(10)
        return a * 1

    closed = MemoryReader.close
    stream = sd_mecha.stream(slow(sd_mecha.model(state())), threads=4)
    next(stream)
    for _ in range(len(KEYS) - 2):
        next(stream)
    assert started.wait(10)

    def closing(self: MemoryReader) -> None:
        outcomes.append("workers alive" if threads_alive() else "workers gone")
        closed(self)

    threading.Timer(0.2, go_on.set).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryReader, "close", closing)
        stream.close()
    assert outcomes == ["workers gone"]


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_what_a_method_raises_reaches_the_consumer(threads: int) -> None:
    m = sd_mecha.model(state())
    seen = []
    stream = sd_mecha.stream(failing(m), threads=threads)
    with pytest.raises(Failure, match="on purpose") as caught:
        seen.extend(key for key, _ in stream)
    assert KEYS[7] not in seen
    assert any(KEYS[7] in note for note in caught.value.__notes__)
    assert threads_alive() == set()


def test_a_streamed_result_is_the_consumers_own() -> None:
    values = state(dtype=torch.float32)
    for _, value in sd_mecha.stream(sd_mecha.model(values), output_dtype=None):
        value.zero_()
    assert torch.equal(values[KEYS[0]], state(dtype=torch.float32)[KEYS[0]])


# --- mappings, defaults ----------------------------------------------------------------------------------------------


def test_a_mapping_is_filled_and_returned() -> None:
    target: dict[str, Any] = {"mine": 1, KEYS[0]: "replaced"}
    got = sd_mecha.merge(sd_mecha.model(state()), output=target)
    assert got is target
    assert target["mine"] == 1
    assert torch.equal(target[KEYS[0]], state()[KEYS[0]])
    assert target["__metadata__"]["format"] == "pt"


def test_any_mutable_mapping_may_be_filled() -> None:
    target: collections.UserDict[str, Any] = collections.UserDict()
    sd_mecha.merge(sd_mecha.model(state()), output=target)
    assert tensors(target).keys() == set(KEYS)


def test_a_mapping_stays_as_it_is_when_the_merge_fails() -> None:
    target: dict[str, Any] = {"mine": 1}
    with pytest.raises(Failure):
        sd_mecha.merge(failing(sd_mecha.model(state())), output=target)
    assert target == {"mine": 1}


def test_a_model_may_be_merged_into_itself() -> None:
    values = {k: v.float() for k, v in state().items()}
    twice = sd_mecha.merge(sd_mecha.n_average(sd_mecha.model(values), sd_mecha.model(state(1))), output=values)
    assert twice is values
    assert torch.allclose(
        values[KEYS[0]].float(), (state()[KEYS[0]].float() + state(1)[KEYS[0]].float()) / 2, atol=1e-2
    )


def test_defaults_give_way_to_what_a_call_says(tmp_path: Path) -> None:
    defaults = sd_mecha.Defaults(output_dtype="float64", threads=2)
    m = sd_mecha.model(state())
    assert tensors(defaults.merge(m))[KEYS[0]].dtype == torch.float64
    assert tensors(defaults.merge(m, output_dtype=None))[KEYS[0]].dtype in (torch.float16, torch.float32)
    assert tensors(defaults.merge(m, output_dtype=...))[KEYS[0]].dtype == torch.float64
    assert defaults.merge(m, output=tmp_path / "o.safetensors") is None
    assert load_file(tmp_path / "o.safetensors")[KEYS[0]].dtype == torch.float64
    with defaults.plan(m) as plan:
        assert {e.dtype for e in plan.outputs[0].values()} == {torch.float64}
    with pytest.raises(OptionError, match="thread"):
        sd_mecha.Defaults(threads=-1)
    with pytest.raises(OptionError, match="unknown"):
        sd_mecha.Defaults(nonsense=1)


class Bar:
    """A progress bar that only knows what is documented."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int, desc: str = "") -> None:
        self.total, self.count, self.open = total, 0, 0
        Bar.made.append(self)

    def update(self, n: int = 1) -> None:
        self.count += n

    def __enter__(self) -> Bar:
        self.open += 1
        return self

    def __exit__(self, *args: object) -> None:
        self.open -= 1


@pytest.mark.parametrize("threads", [0, 2])
def test_a_progress_bar_counts_keys(threads: int) -> None:
    Bar.made.clear()
    sd_mecha.merge(sd_mecha.model(state()), tqdm=Bar, threads=threads)
    with pytest.raises(Failure):
        sd_mecha.merge(failing(sd_mecha.model(state())), tqdm=Bar, threads=threads)
    done, failed = Bar.made
    assert (done.total, done.count, done.open) == (len(KEYS), len(KEYS), 0)
    assert failed.open == 0
    assert failed.count < len(KEYS)
