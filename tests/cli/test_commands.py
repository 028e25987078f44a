"""The commands with the real engine and real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from sd_mecha.cli import main

RECIPE = """version 0.1.0
model "{a}" model_config=null merge_space="weight"
model "{b}" model_config=null merge_space="weight"
merge "weighted_sum" &0 &1 alpha=0.25
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, and a recipe that merges them."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        save_file({"x": torch.full((4, 3), value), "y": torch.full((5,), value)}, tmp_path / f"{name}.safetensors")
    write_recipe(tmp_path / "r.mecha", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    return tmp_path


def write_recipe(path: Path, a: Path | str, b: Path | str) -> None:
    text = RECIPE.format(a=str(a).replace("\\", "\\\\"), b=str(b).replace("\\", "\\\\"))
    path.write_text(text, encoding="utf-8")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_merge_writes_beside_the_recipe(folder: Path) -> None:
    result = call("merge", folder / "r.mecha")
    assert result.exit_code == 0, result.stderr
    merged = load_file(folder / "r.safetensors")
    assert {key: (t.dtype, t.unique().tolist()) for key, t in merged.items()} == {
        "x": (torch.float16, [1.5]),
        "y": (torch.float16, [1.5]),
    }


def test_merge_may_replace_one_of_its_inputs(folder: Path) -> None:
    result = call("merge", folder / "r.mecha", "-o", folder / "a.safetensors", "--dtype", "fp32")
    assert result.exit_code == 0, result.stderr
    assert load_file(folder / "a.safetensors")["y"].tolist() == [1.5] * 5


def test_several_recipes_and_a_folder(folder: Path) -> None:
    write_recipe(folder / "s.mecha", folder / "b.safetensors", folder / "a.safetensors")
    result = call("merge", folder / "r.mecha", folder / "s.mecha", "-o", folder / "out")
    assert result.exit_code == 0, result.stderr
    values = {path.stem: load_file(path)["x"][0, 0].item() for path in (folder / "out").iterdir()}
    assert values == {"r": 1.5, "s": 2.5}


def test_models_dirs_are_for_models_and_not_for_the_output(folder: Path, tmp_path: Path) -> None:
    (folder / "elsewhere").mkdir()
    write_recipe(folder / "relative.mecha", "a.safetensors", "b.safetensors")
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from sd_mecha.cli import main; main()"),
            *("merge", folder / "relative.mecha", "--models-dir", folder, "-o", "out.safetensors"),
        ],
        cwd=folder / "elsewhere",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (folder / "elsewhere").iterdir()) == ["out.safetensors"]


def test_plan_names_the_inputs_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    result = call("plan", folder / "r.mecha")
    assert result.exit_code == 0, result.stderr
    assert "a.safetensors" in result.stdout
    assert "b.safetensors" in result.stdout
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "version"),
        ("version 0.1.0\nmodle &0\n", "line 2"),
        ('version 0.1.0\nmodel "gone.safetensors"\n', "gone.safetensors"),
        ('version 0.1.0\nmodel "gone.safetensors"\nmerge "weighted_summ" &0 &0\n', "weighted_sum"),
    ],
)
def test_a_bad_recipe_is_code_1_with_one_message(folder: Path, recipe: str, message: str) -> None:
    path = folder / "bad.mecha"
    path.write_text(recipe)
    for command in ("merge", "plan"):
        result = call(command, path)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr
    assert not path.with_suffix(".safetensors").exists()


def test_a_file_that_is_no_text_is_a_bad_recipe(folder: Path) -> None:
    result = call("merge", folder / "a.safetensors")
    assert result.exit_code == 1
    assert "a.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failed_merge_leaves_the_old_file_and_no_other(folder: Path) -> None:
    save_file({"x": torch.zeros(9, 9), "y": torch.zeros(5)}, folder / "b.safetensors")
    (folder / "r.safetensors").write_bytes(b"old")
    before = sorted(folder.iterdir())
    result = call("merge", folder / "r.mecha")
    assert result.exit_code == 1
    assert "x" in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "r.safetensors").read_bytes() == b"old"
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a child")
def test_ctrl_c_stops_with_one_message_and_no_half_file(folder: Path) -> None:
    for name in ("a", "b"):
        save_file({str(i): torch.rand(1 << 24) for i in range(8)}, folder / f"{name}.safetensors")
    before = set(folder.iterdir())
    command = [sys.executable, "-c", "from sd_mecha.cli import main; main()", "merge", folder / "r.mecha"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        while child.poll() is None and set(folder.iterdir()) == before:
            time.sleep(0.002)
        was_running = child.poll() is None
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert was_running, f"the merge was over before it could be stopped: {errors}"
    assert child.returncode == 1
    assert errors.startswith("error: stopped")
    assert "Traceback" not in errors
    assert set(folder.iterdir()) == before
