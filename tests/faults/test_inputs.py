"""Models that cannot be read: one error, before anything is written, that says which, what is wrong and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import (
    FileFormatError,
    ModelAccessError,
    ModelNotFoundError,
    PlanError,
    UnknownFormatError,
)
from sd_mecha.extensions import model_dirs
from sd_mecha.extensions.model_formats import ModelFormat
from sd_mecha.storage import files
from tests.faults.support import OLD, only_file, refused, write_header


def merge(*paths: Path | str, output: Path | None = None) -> Any:
    return sd_mecha.merge(sd_mecha.n_average(*(sd_mecha.model(p) for p in paths)), output=output, tqdm=None)


@pytest.mark.parametrize("name", ["nope.safetensors", "nope"])
def test_a_missing_file_is_named_with_the_places_searched(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_dirs, "_dirs", [tmp_path / "models"])
    with refused(ModelNotFoundError, FileNotFoundError, says=[name, tmp_path / "models", tmp_path, "add_path"]):
        merge(name)
    with refused(ModelNotFoundError, says=[tmp_path / name, "check the path"]):
        merge(tmp_path / name)


def test_all_missing_files_are_listed_together(tmp_path: Path, a: Path) -> None:
    paths = [tmp_path / f"gone{i}.safetensors" for i in range(3)]
    with refused(ModelNotFoundError, says=paths):
        merge(a, *paths)


def test_all_unreadable_files_are_listed_together(tmp_path: Path, a: Path) -> None:
    broken = [write_header(tmp_path / f"{i}.safetensors", b"{", length=1 << 40) for i in range(2)]
    with refused(FileFormatError, ValueError, says=broken):
        merge(a, *broken)
    with refused(PlanError, says=[*broken, tmp_path / "gone"]):
        merge(a, *broken, tmp_path / "gone")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with refused(UnknownFormatError, TypeError, says=[tmp_path, "directory", "name a model file in it"]):
        merge(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with refused(UnknownFormatError, says=["pipe", "neither a file nor a directory"]):
        merge(tmp_path / "pipe")


@pytest.mark.skipif(os.name == "nt", reason="long names are missing names there")
def test_a_name_that_is_too_long(tmp_path: Path, a: Path) -> None:
    long = tmp_path / ("x" * 300)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({long.name: ["diffusers", "X"]}))
    for read in (merge, sd_mecha.verify):
        for path in (long, long / "y", tmp_path / "pipeline"):
            with refused(ModelAccessError, says=[long.name, "too long", "check the path"]):
                read(path)
    with refused(ModelAccessError, says=[long, "too long"]):
        sd_mecha.merge(sd_mecha.model(a), output=tmp_path / "out/", shard_size=10, side_files=long)


@pytest.mark.parametrize("name", ["", "m.safetensors", "m", "sub/m.safetensors"])
def test_a_folder_without_permission(closed: Path, name: str) -> None:
    named = closed / name if name else closed  # and no file that may be in it or not
    with refused(
        ModelAccessError, says=[f"model '{named}' cannot be opened: Permission denied; check its permissions"]
    ):
        sd_mecha.verify(named)
    with refused(ModelAccessError, says=[named]):
        merge(named)


def test_a_part_of_a_pipeline_without_permission(closed: Path) -> None:
    (closed.parent / "model_index.json").write_text(json.dumps({"closed": ["diffusers", "X"]}))
    for read in (merge, sd_mecha.verify):
        with refused(ModelAccessError, says=[closed, "Permission denied"]):
            read(closed.parent)


@pytest.mark.parametrize("name", ["secret.safetensors", "secret"])
def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write_header(tmp_path / name, {})

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.io, "FileIO", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with refused(ModelAccessError, PermissionError, says=[path, "Permission denied", "check its permissions"]):
        merge(path)


def test_an_operating_system_error_of_a_third_party_format_names_the_model(a: Path, monkeypatch: Any) -> None:
    def broken(self: Any, path: Path) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ModelFormat, "matches", broken)
    monkeypatch.setattr("sd_mecha.builtin.formats.safetensors.SafetensorsFormat.matches", broken)
    with refused(ModelAccessError, says=[a, "Input/output error"]):
        merge(a)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"PK\x03\x04" + bytes(64), "zip archive"), (b"\x80\x02}q\x00.", "pickle"), (bytes(16), "no known format")],
)
def test_a_file_of_another_format(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with refused(UnknownFormatError, TypeError, says=[path, says, "safetensors"]):
        merge(path)


def entry(offsets: tuple[int, int], shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, tuple[Any, bytes, int | None]] = {
    "header longer than the file": (b"{}", b"", 10**6),
    "header too large": (b"{}", b"", 2**63),
    "not valid JSON": (b"{nope", b"", None),
    "expected a JSON object": (b"[1, 2]", b"", None),
    "beyond the end of the file": ({"w": entry((0, 8))}, bytes(4), None),
    "do not match shape and dtype": ({"w": entry((0, 8), (3,))}, bytes(8), None),
    "overlap": ({"w": entry((0, 8)), "v": entry((4, 12))}, bytes(12), None),
    "out of order": ({"w": entry((-8, 0))}, bytes(8), None),
    "unknown dtype": ({"w": entry((0, 8), dtype="F31")}, bytes(8), None),
    "hole in the data": ({"w": entry((4, 12))}, bytes(12), None),
    "longer than the tensors": ({"w": entry((0, 8))}, bytes(9), None),
    "map from text to text": ({"w": entry((0, 8)), "__metadata__": {"n": 1}}, bytes(8), None),
}


@pytest.mark.parametrize("rule", HOSTILE)
def test_a_hostile_header_is_refused_by_rule_and_nothing_is_written(tmp_path: Path, old: Path, rule: str) -> None:
    path = write_header(tmp_path / "h.safetensors", *HOSTILE[rule])
    with refused(FileFormatError, ValueError, says=[path, rule]):
        merge(path, output=old)
    assert old.read_bytes() == OLD
    assert only_file(old)


def test_truncation_is_noticed_wherever_it_is(tmp_path: Path, a: Path) -> None:
    whole = a.read_bytes()
    path = tmp_path / "short.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with refused(FileFormatError, says=[path]):
            merge(path)


@pytest.mark.parametrize("other", [(4, 6), (1, 4), (6, 1), (24,), (6, 4, 1), ()])
def test_shapes_that_differ_name_key_files_and_shapes(tmp_path: Path, a: Path, other: tuple[int, ...]) -> None:
    path = tmp_path / "other.safetensors"
    sd_mecha.merge(sd_mecha.model({"w": torch.zeros(other), "b": torch.zeros(4)}), output=path)
    model = sd_mecha.model
    at_root = [sd_mecha.weighted_sum(model(a), model(path)), sd_mecha.n_average(model(a), model(a), model(path))]
    for recipe in at_root:
        with refused(PlanError, ValueError, RuntimeError, says=["'w'", a, path, (6, 4), other]):
            sd_mecha.plan(recipe)
    deep = sd_mecha.slerp(model(a), sd_mecha.weighted_sum(model(a), model(path)))
    with refused(PlanError, says=["'w'", a, path, (6, 4), other, "slerp > b: weighted_sum"]):
        sd_mecha.merge(deep)


def test_every_key_with_a_wrong_shape_is_listed() -> None:
    one, other = ({f"k{i}": torch.zeros(i + shift) for i in range(3)} for shift in (1, 2))
    with refused(PlanError, says=["'k0'", "'k1'", "'k2'"]):
        sd_mecha.plan(sd_mecha.weighted_sum(sd_mecha.model(one), sd_mecha.model(other)))
