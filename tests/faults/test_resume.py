"""Merges that go on where an interrupted one stopped: what counts as the same merge, and how much is done again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha import merging
from sd_mecha.errors import ChangedInputError, MechaError, OptionError, OutputError
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.storage.placed_writer import PlacedWriter
from tests.faults.support import OLD, many, only_file, read, refused, write_model

THREADS = pytest.mark.parametrize("threads", [0, 2])


class Interrupted(BaseException):
    """Stands for ctrl-C."""


class Average:
    """A method that averages two models, counts the tensors it makes, and may stop after some of them."""

    def __init__(self) -> None:
        self.made: set[str] = set()
        self.stop_after: int | None = None
        outer = self

        @merge_method(register=False, identifier="counted")
        def counted(
            a: Parameter(torch.Tensor),  # type: ignore[valid-type]
            b: Parameter(torch.Tensor),  # type: ignore[valid-type]
            **kwargs: Any,
        ) -> Return(torch.Tensor):  # type: ignore[valid-type]
            if not a.is_meta:
                if outer.stop_after is not None and len(outer.made) >= outer.stop_after:
                    raise Interrupted
                outer.made.add(kwargs["key"])
            return (a + b) / 2

        self.method = counted

    def __call__(self, *models: Any) -> Any:
        return self.method(*(m if isinstance(m, sd_mecha.RecipeNode) else sd_mecha.model(m) for m in models))


@pytest.fixture
def average() -> Average:
    return Average()


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return many(tmp_path / "one.safetensors", 0.0, count=20, size=500)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return many(tmp_path / "other.safetensors", 2.0, count=20, size=500)


def interrupt(average: Average, recipe: Any, output: Path, after: int, **options: Any) -> None:
    average.made.clear()
    average.stop_after = after
    with pytest.raises(Interrupted):
        sd_mecha.merge(recipe, output=output, resume=True, tqdm=None, **options)
    average.made.clear()
    average.stop_after = None


def finish(recipe: Any, output: Path, **options: Any) -> None:
    sd_mecha.merge(recipe, output=output, resume=True, tqdm=None, **options)


def expected(recipe: Any, folder: Path, **options: Any) -> bytes:
    path = folder / "expected.safetensors"
    sd_mecha.merge(recipe, output=path, tqdm=None, **options)
    return path.read_bytes()


@THREADS
@pytest.mark.parametrize("after", [1, 7, 19])
def test_only_what_is_missing_is_made(
    average: Average, one: Path, other: Path, old: Path, threads: int, after: int
) -> None:
    recipe = average(one, other)
    interrupt(average, recipe, old, after, threads=threads)
    assert old.read_bytes() == OLD
    finish(recipe, old, threads=threads)
    # workers may have been interrupted between making a tensor and writing it, or have made some more meanwhile
    assert 20 - after - threads <= len(average.made) <= 20 - after + threads
    assert only_file(old)
    assert old.read_bytes() == expected(recipe, one.parent)


@THREADS
def test_interrupted_again_and_again(average: Average, one: Path, other: Path, old: Path, threads: int) -> None:
    recipe = average(one, other)
    for _ in range(4):
        interrupt(average, recipe, old, 4, threads=threads)
    finish(recipe, old, threads=threads)
    assert len(average.made) <= 4 + 4 * threads
    assert old.read_bytes() == expected(recipe, one.parent)


@THREADS
def test_tensors_that_the_output_lacks(average: Average, tmp_path: Path, old: Path, threads: int) -> None:
    tensors = {f"k{i:02}": torch.full((500,), float(i)) for i in range(20)}
    for i in (2, 9, 15):
        tensors[f"k{i:02}"][3] = torch.nan
    one, other = (write_model(tmp_path / name, **tensors) for name in ("one.safetensors", "other.safetensors"))
    recipe = average(one, other)
    for after in (5, 6):
        interrupt(average, recipe, old, after, threads=threads)
    finish(recipe, old, threads=threads)
    assert len(read(old)) == 17
    assert old.read_bytes() == expected(recipe, tmp_path)
    assert only_file(old)


def test_fewer_threads_and_less_memory_make_the_same_file(average: Average, one: Path, other: Path, old: Path) -> None:
    recipe = average(one, other)
    interrupt(average, recipe, old, 7, threads=2, total_buffer_size=1 << 20)
    finish(recipe, old, threads=0)
    assert len(average.made) <= 13 + 2
    assert old.read_bytes() == expected(recipe, one.parent)


def changed_input(one: Path, **options: Any) -> dict[str, Any]:
    many(one, 5.0, count=20, size=500)
    return options


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "an input": changed_input,
    "a touched input": lambda one: os.utime(one, ns=(1, 1)) or {},
    "the output's dtype": lambda one: {"output_dtype": torch.bfloat16},
    "the dtype to compute in": lambda one: {"merge_dtype": torch.float64},
    "what counts as missing": lambda one: {"omit_non_finite_inputs": False},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_input_or_option_starts_afresh(
    average: Average, one: Path, other: Path, old: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    interrupt(average, average(one, other), old, 7, threads=0)
    options = CHANGES[what](one)
    recipe = average(one, other)
    finish(recipe, old, threads=0, **options)
    assert len(average.made) == 20
    assert "starting afresh: the recipe, an input or an option changed" in caplog.text
    assert old.read_bytes() == expected(recipe, one.parent, **options)
    assert only_file(old)


def test_another_recipe_starts_afresh(average: Average, one: Path, other: Path, old: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    interrupt(average, average(one, other), old, 7, threads=0)
    recipe = average(other, average(one, other))
    finish(recipe, old, threads=0)
    assert "starting afresh" in caplog.text
    assert old.read_bytes() == expected(recipe, one.parent)


def test_another_program_of_the_same_name_starts_afresh(one: Path, other: Path, old: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    first = Average()
    interrupt(first, first(one, other), old, 7, threads=0)

    @merge_method(register=False, identifier="counted")
    def counted(
        a: Parameter(torch.Tensor),  # type: ignore[valid-type]
        b: Parameter(torch.Tensor),  # type: ignore[valid-type]
        **kwargs: Any,
    ) -> Return(torch.Tensor):  # type: ignore[valid-type]
        return a + b

    recipe = counted(sd_mecha.model(one), sd_mecha.model(other))
    finish(recipe, old, threads=0)
    assert "starting afresh" in caplog.text
    assert old.read_bytes() == expected(recipe, one.parent)


def test_the_same_program_in_a_new_object_goes_on(one: Path, other: Path, old: Path) -> None:
    first, second = Average(), Average()
    interrupt(first, first(one, other), old, 7, threads=0)
    finish(second(one, other), old, threads=0)
    assert len(second.made) == 13


def test_models_in_memory_count_by_their_values(average: Average, one: Path, old: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "sd_mecha")
    tensors = {key: tensor + 1 for key, tensor in read(one).items()}
    interrupt(average, average(one, tensors), old, 7, threads=0)
    finish(average(one, {key: tensor.clone() for key, tensor in tensors.items()}), old, threads=0)
    assert len(average.made) == 13
    interrupt(average, average(one, tensors), old, 7, threads=0)
    tensors["k05"][3] += 1
    finish(average(one, tensors), old, threads=0)
    assert len(average.made) == 20
    assert "starting afresh" in caplog.text


def test_a_literal_with_tensors(average: Average, one: Path, other: Path, old: Path) -> None:
    def recipe(value: float) -> Any:
        return sd_mecha.weighted_sum(average(one, other), sd_mecha.model(other), alpha=torch.tensor(value))

    interrupt(average, recipe(0.25), old, 7, threads=0)
    finish(recipe(0.25), old, threads=0)
    assert len(average.made) == 13
    interrupt(average, recipe(0.25), old, 7, threads=0)
    finish(recipe(0.5), old, threads=0)
    assert len(average.made) == 20


def test_a_run_without_the_option_removes_what_was_kept(average: Average, one: Path, other: Path, old: Path) -> None:
    recipe = average(one, other)
    interrupt(average, recipe, old, 7, threads=0)
    sd_mecha.merge(recipe, output=old, threads=0)
    assert len(average.made) == 20
    assert only_file(old)


def test_without_the_option_nothing_is_kept(average: Average, one: Path, other: Path, old: Path) -> None:
    average.stop_after = 7
    with pytest.raises(Interrupted):
        sd_mecha.merge(average(one, other), output=old, threads=0)
    assert only_file(old)


def test_several_outputs_go_on_together(average: Average, one: Path, other: Path, old: Path) -> None:
    second = old.with_name("second.safetensors")

    def recipes() -> dict[Path, Any]:
        return {old: average(one, other), second: sd_mecha.weighted_sum(average(one, other), sd_mecha.model(one), 0.5)}

    average.stop_after = 7
    with pytest.raises(Interrupted):
        sd_mecha.merge_many(recipes(), threads=0, resume=True, tqdm=None)
    assert old.read_bytes() == OLD
    average.made.clear()
    average.stop_after = None
    sd_mecha.merge_many(recipes(), threads=0, resume=True, tqdm=None)
    assert len(average.made) == 13
    for path, recipe in recipes().items():
        assert path.read_bytes() == expected(recipe, one.parent)
    assert sorted(os.listdir(old.parent)) == [old.name, second.name]


@pytest.mark.parametrize("case", ["files", "files checksums", "files scaled_fp8", "folders", "folders checksums"])
def test_all_outputs_are_durable_before_the_first_is_completed(
    average: Average, one: Path, other: Path, old: Path, case: str, monkeypatch: Any
) -> None:
    """The last steps of one output may be the last ones at all: nothing that the others have is made again."""
    kind, *options = case.split()
    ending = ".safetensors" if kind == "files" else "/"

    def merge() -> None:
        recipes = {f"{old.parent}/{i}{ending}": average(model, other) for i, model in enumerate((one, other))}
        sd_mecha.merge_many(recipes, threads=0, resume=True, tqdm=None, **dict.fromkeys(options, True))

    def interrupt(*args: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(PlacedWriter, "commit", interrupt)
        patch.setattr(PlacedWriter, "abort", lambda self: self._output.release())
        with pytest.raises(Interrupted):
            merge()
    assert len(average.made) == 20
    average.made.clear()
    merge()
    assert not average.made


def test_what_one_output_lacks_is_not_made_over_what_it_has(tmp_path: Path, monkeypatch: Any) -> None:
    """One program makes a tensor of two outputs; one lacks it, so others have moved there; the other is incomplete."""
    size = 400_000
    tensors, spoilt = ({"aa": torch.randn(size).half(), "zz": torch.randn(size)} for _ in range(2))
    spoilt["zz"][-1] = torch.nan
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"  # not sorted: what is left out is made last
    torch.save(tensors, one)
    torch.save(spoilt, other)

    def merge(folder: str) -> list[bytes]:
        paths = [tmp_path / folder / name for name in ("first.safetensors", "second.safetensors")]
        paths[0].parent.mkdir(exist_ok=True)
        recipes = [sd_mecha.n_average(sd_mecha.model(one), sd_mecha.model(m)) for m in (other, one)]
        both = dict(zip(paths, recipes, strict=True))
        sd_mecha.merge_many(both, threads=0, resume=True, tqdm=None, output_dtype=None, merge_dtype=None)
        return [path.read_bytes() for path in paths]

    def interrupt(*args: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        patch.setattr(PlacedWriter, "abort", lambda self: self._output.release())
        patch.setattr(merging, "settle", lambda writer: None)  # or a disk that loses the end of a journal
        with pytest.raises(Interrupted):
            merge("interrupted")
    assert merge("interrupted") == merge("whole")


def test_matrices_as_fp8(average: Average, tmp_path: Path, old: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"blocks.{i}.weight": torch.randn(8, 6, generator=generator) for i in range(12)}
    tensors |= {f"blocks.{i}.bias": torch.randn(6, generator=generator) for i in range(12)}
    path = tmp_path / "matrices.safetensors"
    write_model(path, **tensors)
    recipe = average(path, path)
    interrupt(average, recipe, old, 11, threads=0, scaled_fp8=True)
    finish(recipe, old, threads=0, scaled_fp8=True)
    assert len(average.made) == 13
    assert old.read_bytes() == expected(recipe, tmp_path, scaled_fp8=True)


def test_progress_counts_what_is_complete(average: Average, one: Path, other: Path, old: Path) -> None:
    class Bar:
        updates = 0
        total = 0

        def __init__(self, total: int, desc: str) -> None:
            Bar.total = total

        def update(self) -> None:
            Bar.updates += 1

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *args: object) -> None: ...

    recipe = average(one, other)
    interrupt(average, recipe, old, 7, threads=0)
    sd_mecha.merge(recipe, output=old, threads=0, resume=True, tqdm=Bar)
    assert Bar.updates == Bar.total == 20


def test_outputs_in_memory_cannot_be_resumed(average: Average, one: Path, other: Path) -> None:
    with refused(OptionError, says=["resume", "in memory"]):
        sd_mecha.merge(average(one, other), output={}, resume=True)
    with refused(OptionError, says=["resume", "in memory"]):
        sd_mecha.merge(average(one, other), resume=True)


def test_an_input_that_changes_while_it_is_merged(average: Average, one: Path, other: Path, old: Path) -> None:
    """Views, which show a file in another way, tell of it, too."""
    prefixed = write_model(
        one.with_name("prefixed.safetensors"), **{f"model.diffusion_model.{k}": t for k, t in read(one).items()}
    )

    @merge_method(register=False)
    def touch(a: Parameter(torch.Tensor)) -> Return(torch.Tensor):  # type: ignore[valid-type]
        if not a.is_meta:
            os.utime(prefixed, ns=(1, 1))
        return a

    for resume in (False, True):
        os.utime(prefixed)
        with refused(ChangedInputError, OSError, MechaError, says=[prefixed, "changed while it was in use"]):
            sd_mecha.merge(touch(sd_mecha.model(prefixed)), output=old, threads=0, resume=resume)
        assert old.read_bytes() == OLD
    os.utime(prefixed)
    finish(touch(sd_mecha.model(one)), old, threads=0)
    assert only_file(old)


@THREADS
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_merge_to_the_same_output_is_refused(
    average: Average, one: Path, other: Path, old: Path, threads: int, resume: bool
) -> None:
    seen = []

    @merge_method(register=False)
    def intrude(a: Parameter(torch.Tensor)) -> Return(torch.Tensor):  # type: ignore[valid-type]
        if not a.is_meta and not seen:
            seen.append(1)
            for again in (False, True):
                with refused(OutputError, says=[old, "another merge is writing to it", "choose another name"]):
                    sd_mecha.merge(average(one, other), output=old, resume=again, threads=0)
        return a

    recipe = intrude(average(one, other))
    sd_mecha.merge(recipe, output=old, threads=threads, resume=resume)
    assert seen
    assert only_file(old)
    assert {k: t.tolist() for k, t in read(old).items()} == {
        k: t.tolist() for k, t in sd_mecha.merge(average(one, other)).items() if k != "__metadata__"
    }
