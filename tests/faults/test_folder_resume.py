"""Folders whose last steps fail: the old one stays, and a run that goes on makes nothing that was complete."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import OutputError
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.storage import placed_writer
from sd_mecha.storage.capabilities import capabilities
from sd_mecha.storage.folders import output_folder
from tests.faults.support import write_model

COUNT = 8


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def journalled(output: Path) -> set[str]:
    """The tensors that the journals call complete."""
    marks = {}
    for path in output.parent.glob(f".{output.name}.part.journals/*"):
        for line in path.read_bytes().split(b"\n")[1:-1]:
            name, mark, *_ = json.loads(line)
            marks[name] = mark is not False
    return {name for name, complete in marks.items() if complete}


class Merge:
    """Makes a folder of four files, of which the first lacks a tensor, and counts what it computes."""

    def __init__(self, folder: Path) -> None:
        self.made: set[str] = set()
        self.output = folder / "out"
        tensors = {f"k{i}": torch.full((100,), float(i)) for i in range(COUNT)}
        tensors["k0"][3] = torch.nan
        self._model = write_model(folder / "model.safetensors", **tensors)
        outer = self

        @merge_method(register=False, identifier="counted")
        def counted(a: Parameter(torch.Tensor), **kwargs: Any) -> Return(torch.Tensor):  # type: ignore[valid-type]
            if not a.is_meta:
                outer.made.add(kwargs["key"])
            return a + 1

        self._method = counted

    def __call__(self, threads: int = 0) -> None:
        self.made.clear()
        recipe = self._method(sd_mecha.model(self._model))
        options: dict[str, Any] = {"output_dtype": None, "tqdm": None, "shard_size": 800, "threads": threads}
        sd_mecha.merge(recipe, output=self.output, resume=True, **options)


class Failing:
    """A system call that fails the `moment`-th time, or from then on."""

    def __init__(self, call: Callable[..., Any], moment: int, *, sticks: bool) -> None:
        self.count = 0
        self._call, self._moment, self._sticks = call, moment, sticks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self._moment or (self._sticks and self.count > self._moment):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._call(*args, **kwargs)


CALLS = ["fsync", "ftruncate", "pwrite", "rename", "chmod", "exchange"]


@pytest.mark.parametrize("sticks", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_complete_is_not_made_again(
    tmp_path: Path, call: str, sticks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, call) and not (call == "exchange" and capabilities.exchange):
        pytest.skip("no such call here")
    monkeypatch.setattr(capabilities, "exchange", call == "exchange")
    merge = Merge(tmp_path)
    merge()
    new = contents(merge.output)
    assert len(merge.made) == COUNT - 1
    (merge.output / "model-00001-of-00004.safetensors").write_bytes(b"old")
    (merge.output / "notes").write_bytes(b"mine")
    old = contents(merge.output)
    moment, reached, nothing_left = 0, True, 0
    while reached:
        moment += 1
        with monkeypatch.context() as patch:
            where, name = (output_folder, "_exchange") if call == "exchange" else (os, call)
            failing = Failing(getattr(where, name), moment, sticks=sticks)
            patch.setattr(where, name, failing)
            failure = ""
            try:
                merge()
            except OutputError as error:
                failure = str(error)
        if failure:
            assert os.strerror(errno.EIO) in failure
            # where neither new nor old can be named any more, the next run does that
            assert contents(merge.output) in ([old, {}] if call == "rename" and sticks else [old])
            complete = journalled(merge.output)
            merge()
            assert not merge.made & complete
            nothing_left += not merge.made
        reached = failing.count >= moment
        assert contents(merge.output) == {**new, "notes": b"mine"}
        assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "out"]
        (merge.output / "model-00001-of-00004.safetensors").write_bytes(b"old")
    assert nothing_left


def test_an_index_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    merge = Merge(tmp_path)
    put = output_folder.OutputFolder.put

    def refuse(self: Any, name: str, content: Any) -> None:
        if name.endswith(".index.json"):
            raise OutputError("no room for it")
        put(self, name, content)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(output_folder.OutputFolder, "put", refuse)
            with pytest.raises(OutputError, match="no room for it"):
                merge()
        assert f"{str(merge.output)!r}: what is complete is kept; run again with resume=True" in caplog.text
    assert merge.made == set()
    assert not merge.output.exists()
    merge()
    assert merge.made == set()
    assert contents(merge.output).keys() > {"model.safetensors.index.json"}
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "out"]


def test_moving_is_undone_at_most_for_the_last_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while gaps are closed costs no more than what was on its way."""
    monkeypatch.setattr(placed_writer, "_GROUP_SIZE", 400)
    merge = Merge(tmp_path)
    merge.output = tmp_path / "out.safetensors"
    options: dict[str, Any] = {"output_dtype": None, "tqdm": None, "threads": 0, "resume": True}
    recipe = merge._method(sd_mecha.model(merge._model))
    sd_mecha.merge(recipe, output=merge.output, **options)
    whole = merge.output.read_bytes()
    moves = COUNT - 1
    for failed in range(moves + 1):  # each move, and then the header
        merge.output.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", Failing(os.pwrite, moves + 1 + failed, sticks=True))
            with pytest.raises(OutputError):
                sd_mecha.merge(recipe, output=merge.output, **options)
        merge.made.clear()
        sd_mecha.merge(recipe, output=merge.output, **options)
        assert len(merge.made) == (1 if failed < moves else 0)
        assert merge.output.read_bytes() == whole


def interrupted(recipe: Any, **options: Any) -> None:
    class Stop:
        """A progress bar that stops the merge at its third step."""

        def __init__(self, **kwargs: Any) -> None:
            self.steps = 0

        def __enter__(self) -> Stop:
            return self

        def __exit__(self, *args: object) -> None: ...

        def update(self, *args: Any) -> None:
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sd_mecha.merge(recipe, resume=True, threads=0, tqdm=Stop, **options)


@pytest.mark.parametrize(
    ("first", "then"),
    [(800, {"shard_size": 800, "output_dtype": None}), (800, {"shard_size": 1600}), (None, {"shard_size": 800}),
     (800, {"output_format": "safetensors"})],
    ids=["dtype", "larger files", "a folder for a file", "a file for a folder"],
)  # fmt: skip
def test_what_was_kept_and_is_of_no_use_is_said_to_go(
    tmp_path: Path, first: int | None, then: dict[str, Any], caplog: Any
) -> None:
    path = write_model(tmp_path / "model.safetensors", **{f"k{i}": torch.full((100,), float(i)) for i in range(COUNT)})
    recipe, output = sd_mecha.model(path), tmp_path / "out"
    size: dict[str, Any] = {"output_format": "safetensors"} if first is None else {"shard_size": first}
    interrupted(recipe, output=output, output_dtype=torch.float16, **size)
    caplog.clear()
    sd_mecha.merge(recipe, output=output, resume=True, threads=0, tqdm=None, **{"output_dtype": torch.float16, **then})
    said = [record.getMessage() for record in caplog.records if "starting afresh" in record.getMessage()]
    assert said == [f"output {str(output)!r}: starting afresh: the recipe, an input or an option changed"]
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "out"]
