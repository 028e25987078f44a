"""Where relative paths lead."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_mecha.errors import ModelNotFoundError
from sd_mecha.extensions import model_dirs


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three directories: `first` and `second` for models, `here` as working directory."""
    for name in ("first", "second", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(model_dirs, "_dirs", [])
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_without_directories_the_working_directory_counts(places: Path) -> None:
    (places / "here/a.safetensors").touch()
    assert model_dirs.resolve_input("a.safetensors") == places / "here/a.safetensors"
    assert model_dirs.resolve_output("out/b.safetensors") == places / "here/out/b.safetensors"
    assert model_dirs.normalize_path("missing") == places / "here/missing"


def test_directories_are_searched_in_order(places: Path) -> None:
    model_dirs.add_path(places / "first")
    model_dirs.add_path(str(places / "second"))
    for name in ("here", "second", "first"):
        (places / name / "a.safetensors").touch()
        assert model_dirs.resolve_input("a.safetensors") == places / name / "a.safetensors"
    assert model_dirs.resolve_output("a.safetensors") == places / "first/a.safetensors"


def test_added_once_and_absolute(places: Path) -> None:
    model_dirs.add_path("../first")
    model_dirs.add_path(places / "first")
    assert model_dirs.get_all() == [places / "first"]
    model_dirs.remove_path(places / "first")
    assert model_dirs.get_all() == []


def test_absolute_paths_stay(places: Path) -> None:
    model_dirs.add_path(places / "first")
    path = places / "second/a.safetensors"
    path.touch()
    assert model_dirs.resolve_input(path) == model_dirs.resolve_output(path) == model_dirs.normalize_path(path) == path


def test_home_is_expanded(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(places))
    monkeypatch.setenv("USERPROFILE", str(places))
    assert model_dirs.resolve_output("~/x.safetensors") == places / "x.safetensors"


def test_missing_input_lists_the_places(places: Path) -> None:
    model_dirs.add_path(places / "first")
    with pytest.raises(FileNotFoundError) as caught:
        model_dirs.resolve_input("sub/gone.safetensors")
    assert isinstance(caught.value, ModelNotFoundError)
    for text in (
        "sub/gone.safetensors",
        "--models-dir",
        "sd_mecha.extensions.model_dirs.add_path()",
        str(places / "first"),
        str(places / "here"),
    ):
        assert text in str(caught.value)


def test_missing_absolute_input(places: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        model_dirs.resolve_input(places / "gone.safetensors")


@pytest.mark.parametrize(
    ("target", "what"), [("nowhere", "leads nowhere, to 'nowhere'"), ("a.safetensors", "is a link in a circle")]
)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_that_leads_nowhere_is_called_one(places: Path, target: str, what: str, absolute: bool) -> None:
    model_dirs.add_path(places / "first")
    link = places / "second/a.safetensors" if absolute else places / "first/a.safetensors"
    link.symlink_to(target)
    with pytest.raises(ModelNotFoundError) as caught:
        model_dirs.resolve_input(link if absolute else "a.safetensors")
    assert str(link) in str(caught.value)
    assert what in str(caught.value)
    assert "does not exist" not in str(caught.value)


def test_a_link_on_the_way_is_named(places: Path) -> None:
    (places / "here/models").symlink_to(places / "gone")
    with pytest.raises(ModelNotFoundError, match="here/models' is a link that leads nowhere"):
        model_dirs.resolve_input("models/a.safetensors")


def test_a_link_to_another_directory_is_looked_for_in_the_next(places: Path) -> None:
    model_dirs.add_path(places / "first")
    (places / "first/a.safetensors").symlink_to("nowhere")
    (places / "here/a.safetensors").touch()
    assert model_dirs.resolve_input("a.safetensors") == places / "here/a.safetensors"
