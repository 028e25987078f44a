"""A user's mistake on the command line: an exit code, one message on the error stream, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from sd_mecha.cli import main
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.merge_methods import _registry as methods
from tests.faults.support import OLD, only_file, write_header, write_model


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def recipe(path: Path, *models: Path, method: str = "n_average") -> Path:
    lines = ["version 0.1.0", *(f'model "{m.as_posix()}"' for m in models)]
    lines.append(f'merge "{method}" ' + " ".join(f"&{i}" for i in range(len(models))))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def failed(result: Result, *says: str | Path) -> None:
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for part in says:
        assert str(part) in result.stderr


def test_models_that_cannot_be_read(tmp_path: Path, a: Path, old: Path) -> None:
    broken = write_header(tmp_path / "broken.safetensors", b"{nope")
    for models, says in {
        (a, tmp_path / "gone.safetensors"): ["gone.safetensors", "does not exist"],
        (a, broken): [broken, "JSON"],
        (a, tmp_path): ["directory"],
    }.items():
        for command in (["plan"], ["merge", "-o", old]):
            result = call(command[0], recipe(tmp_path / "r.mecha", *models), *command[1:])
            failed(result, *says)
    assert old.read_bytes() == OLD
    assert only_file(old)


def test_shapes_that_differ(tmp_path: Path, a: Path, old: Path) -> None:
    other = write_model(tmp_path / "other.safetensors", w=torch.zeros(1, 4), b=torch.zeros(4))
    failed(call("merge", recipe(tmp_path / "r.mecha", a, other), "-o", old), "'w'", a, other, "(6, 4)", "(1, 4)")
    assert old.read_bytes() == OLD


def test_an_unknown_method(tmp_path: Path, a: Path) -> None:
    path = recipe(tmp_path / "r.mecha", a, a, method="weigthed_sum")
    failed(call("merge", path), path, "line 4", "weighted_sum")


def test_a_wrong_merge_space(tmp_path: Path, a: Path) -> None:
    path = recipe(tmp_path / "r.mecha", a, a, method="subtract")
    failed(call("merge", path), "delta is what subtract returns", "weight is asked of the result")
    assert call("merge", path, "--merge-space", "any", "-o", tmp_path / "d.safetensors").exit_code == 0


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here that nobody can write to")
def test_an_output_that_cannot_be_written(tmp_path: Path, a: Path) -> None:
    failed(call("merge", recipe(tmp_path / "r.mecha", a), "-o", "/proc/out.safetensors"), "/proc/out.safetensors")


def test_a_fault_of_a_method_names_it_and_the_key(tmp_path: Path, a: Path) -> None:
    @merge_method(identifier="test_faulty")
    def faulty(a: Parameter(torch.Tensor)) -> Return(torch.Tensor):  # type: ignore[valid-type]
        raise ZeroDivisionError("by design") if not a.is_meta else NotImplementedError

    try:
        path = recipe(tmp_path / "r.mecha", a, method="test_faulty")
        result = call("merge", path)
        failed(result, "ZeroDivisionError: by design", "merge method test_faulty failed at key", "--debug")
        assert "Traceback" in call("merge", path, "--debug").stderr
    finally:
        methods.remove("test_faulty")


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge",),
        ("merge", "gone.mecha"),
        ("merge", "r.mecha", "--threads", "-1"),
        ("merge", "r.mecha", "--memory", "lots"),
        ("merge", "r.mecha", "--dtype", "float17"),
        ("plan", "r.mecha", "--models-dir", "gone"),
        ("melt", "r.mecha"),
    ],
)
def test_wrong_usage_is_code_2(tmp_path: Path, a: Path, arguments: tuple[str, ...]) -> None:
    recipe(tmp_path / "r.mecha", a)
    where = [str(tmp_path / x) if x == "r.mecha" else x for x in arguments]
    result = call(*where)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
