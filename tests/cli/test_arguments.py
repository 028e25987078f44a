"""What the flags mean for the engine, and where results go. The engine itself is a stand-in here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

import sd_mecha
from sd_mecha.cli import main
from sd_mecha.cli.merge import output_paths
from sd_mecha.errors import PlanError
from sd_mecha.progress import NoProgress, RichProgress


class Engine:
    """Records how it is called; writes the name of the recipe as output."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.outputs: dict[Path, str] = {}

    def merge(self, recipe: str, *, output: Path, **arguments: Any) -> None:
        self.merge_many({output: recipe}, **arguments)

    def merge_many(self, recipes: dict[Path, str], **arguments: Any) -> None:
        self.arguments = arguments
        if self.failure is not None:
            raise self.failure
        self.outputs = recipes
        for path, recipe in recipes.items():
            path.write_text(recipe)

    def plan(self, recipe: str, **arguments: Any) -> str:
        self.arguments = arguments
        return f"the plan of {recipe}"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    engine = Engine()
    for name in ("merge", "merge_many", "plan"):
        monkeypatch.setattr(sd_mecha, name, getattr(engine, name), raising=False)
    monkeypatch.setattr(sd_mecha, "deserialize_path", lambda path: f"recipe {path.stem}", raising=False)
    monkeypatch.setattr(sd_mecha, "model", lambda path: f"model {path}", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("r", "s"):
        (tmp_path / f"{name}.mecha").write_text("version 0.1.0\n")
    return engine


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_without_flags_the_engine_gets_its_defaults(engine: Engine, tmp_path: Path) -> None:
    result = call("merge", "r.mecha")
    assert result.exit_code == 0, result.output
    assert engine.outputs == {tmp_path / "r.safetensors": "recipe r"}
    assert engine.arguments == {
        "output_dtype": torch.float16,
        "merge_dtype": torch.float32,
        "merge_device": "cpu",
        "strict_merge_space": "weight",
        "tqdm": RichProgress,
    }


def test_flags_reach_the_engine(engine: Engine) -> None:
    flags = "--dtype bf16 --merge-dtype keep --device cuda:1 --threads 0 --memory 512MB --merge-space any"
    result = call("merge", "r.mecha", "--no-progress", "--fallback", "base.safetensors", *flags.split())
    assert result.exit_code == 0, result.output
    assert engine.arguments == {
        "output_dtype": torch.bfloat16,
        "merge_dtype": None,
        "merge_device": "cuda:1",
        "threads": 0,
        "total_buffer_size": 512_000_000,
        "strict_merge_space": None,
        "fallback_model": "model base.safetensors",
        "tqdm": NoProgress,
    }


def test_flags_of_the_output_reach_the_engine(engine: Engine, tmp_path: Path) -> None:
    flags = "--shard-size 5GB --side-files org/base --resume --checksums"
    result = call("merge", "r.mecha", "-o", "merged", *flags.split())
    assert result.exit_code == 0, result.output
    assert list(engine.outputs) == [tmp_path / "merged"]
    asked = {"shard_size": 5_000_000_000, "side_files": "org/base", "resume": True, "checksums": True}
    assert engine.arguments.items() >= asked.items()


def test_shards_of_several_recipes_go_into_folders_of_their_names(engine: Engine, tmp_path: Path) -> None:
    result = call("merge", "r.mecha", "s.mecha", "-o", "merged", "--shard-size", "1GB")
    assert result.exit_code == 0, result.output
    assert list(engine.outputs) == [tmp_path / "merged/r", tmp_path / "merged/s"]


def test_an_unknown_format_is_named(engine: Engine) -> None:
    result = call("merge", "r.mecha", "--format", "safetensor")
    assert result.exit_code == 1
    assert "unknown model format: 'safetensor'" in result.output
    assert "safetensors" in result.output


def test_plan_takes_the_same_flags(engine: Engine) -> None:
    result = call("plan", "r.mecha", "--dtype", "fp32", "--memory", "1GiB", "--fallback", "s.mecha")
    assert result.output == "the plan of recipe r\n"
    assert engine.arguments["output_dtype"] is torch.float32
    assert engine.arguments["total_buffer_size"] == 1 << 30
    assert engine.arguments["fallback_model"] == "recipe s"


def test_several_recipes_are_one_pass(engine: Engine, tmp_path: Path) -> None:
    result = call("merge", "r.mecha", "s.mecha", "-o", "new/folder")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "new/folder"
    assert engine.outputs == {folder / "r.safetensors": "recipe r", folder / "s.safetensors": "recipe s"}


def test_folders_that_a_failed_merge_made_go_again(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for failure in (PlanError("no"), KeyboardInterrupt()):
        engine.failure = failure
        for output in ("new/sub/x.safetensors", "there/new/x.safetensors", "there/x.safetensors"):
            assert call("merge", "r.mecha", "-o", output).exit_code == 1
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [["merge", "r.mecha"], ["extract", "tuned", "base"]])
def test_outputs_are_local(engine: Engine, command: list[str]) -> None:
    result = call(*command, "-o", "s3://bucket/out.safetensors")
    assert result.exit_code == 2
    assert "s3:// is an address, and outputs are local" in result.output


def test_the_last_line_tells_size_time_rate_and_memory(engine: Engine) -> None:
    last = call("merge", "r.mecha").output.splitlines()[-1]
    assert "r.safetensors: 8 B in " in last
    assert "/s), peak memory " in last


@pytest.mark.parametrize(
    ("recipes", "output", "expected"),
    [
        (["a/r.mecha"], None, ["a/r.safetensors"]),
        (["a/r.v2.mecha"], None, ["a/r.v2.safetensors"]),
        (["a/r.mecha"], "x", ["x"]),
        (["a/r.mecha"], "x.safetensors", ["x.safetensors"]),
        (["a/r.mecha"], "x/", ["x/r.safetensors"]),
        (["a/r.mecha"], "there", ["there/r.safetensors"]),
        (["a/r.mecha", "b/s.mecha"], None, ["a/r.safetensors", "b/s.safetensors"]),
        (["a/r.mecha", "b/s.mecha"], "x", ["x/r.safetensors", "x/s.safetensors"]),
    ],
)
def test_where_outputs_go(
    recipes: list[str],
    output: str | None,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert output_paths([Path(r) for r in recipes], output) == [tmp_path / path for path in expected]


@pytest.mark.parametrize(
    ("recipes", "output"),
    [
        (["a/r.mecha", "b/r.mecha"], "folder"),
        (["r.mecha", "r.mecha"], None),
        (["r.mecha", "s.mecha"], "x.safetensors"),
    ],
)
def test_two_recipes_never_share_an_output(recipes: list[str], output: str | None) -> None:
    with pytest.raises(click.UsageError, match=r"both be written|one file"):
        output_paths([Path(r) for r in recipes], output)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("r.mecha", "r.mecha has the name of a recipe: name the model r.safetensors"),
        ("new.MECHA", "name the model new.safetensors"),
        ("link.safetensors", "is the recipe r.mecha itself"),
        ("hard.safetensors", "is the recipe r.mecha itself"),
        ("file.safetensors/", "file.safetensors is a file: leave the slash out"),
        ("new.safetensors/", "new.safetensors has the ending .safetensors of a file: leave the slash out"),
        ("file.safetensors/x", "file.safetensors' is a file, and no folder"),
        ("file.safetensors/x/y.safetensors", "file.safetensors' is a file, and no folder"),
        ("nowhere/x.safetensors", "nowhere' is a link that leads nowhere, to 'gone', and no folder"),
    ],
)
def test_an_output_that_is_surely_a_mistake_is_refused(
    engine: Engine, tmp_path: Path, output: str, message: str
) -> None:
    (tmp_path / "link.safetensors").symlink_to("r.mecha")
    (tmp_path / "hard.safetensors").hardlink_to(tmp_path / "r.mecha")
    (tmp_path / "file.safetensors").write_text("a model")
    (tmp_path / "nowhere").symlink_to("gone")
    before = sorted(tmp_path.iterdir())
    result = call("merge", "r.mecha", "-o", output)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert engine.outputs == {}
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_named_after_its_recipe_does_not_take_the_place_of_another(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "r.safetensors").symlink_to("s.mecha")
    result = call("merge", "r.mecha", "s.mecha")
    assert result.exit_code == 2
    assert "is the recipe s.mecha itself" in result.stderr
    assert engine.outputs == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge",),
        ("merge", "missing.mecha"),
        ("merge", "."),
        ("merge", "r.mecha", "--memory", "a lot"),
        ("merge", "r.mecha", "--threads", "-1"),
        ("merge", "r.mecha", "--dtype", "fp17"),
        ("merge", "r.mecha", "--models-dir", "missing"),
        ("merge", "r.mecha", "--no-such-flag"),
        ("merge", "r.mecha", "s.mecha", "-o", "one.safetensors"),
        ("plan", "r.mecha", "s.mecha"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_code_2_and_does_nothing(engine: Engine, arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert engine.outputs == {}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (PlanError(["shapes differ", "configs differ"]), "shapes differ\nconfigs differ"),
        (OSError(28, "No space left on device", "/out"), "/out: No space left on device"),
        (KeyboardInterrupt(), "stopped"),
        (ZeroDivisionError("in a method"), "ZeroDivisionError: in a method"),
    ],
)
def test_a_failure_is_code_1_and_one_message(engine: Engine, failure: BaseException, message: str) -> None:
    engine.failure = failure
    result = call("merge", "r.mecha")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_debug_shows_where_it_failed(engine: Engine) -> None:
    engine.failure = PlanError("shapes differ")
    result = call("merge", "r.mecha", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.rstrip().endswith("error: shapes differ")
