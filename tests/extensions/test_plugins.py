"""Third-party plugs: entry points are found, a broken one harms nobody else, formats of sd-mecha 1 still work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.extensions import model_formats
from sd_mecha.extensions.model_formats import ModelFormat
from tests.extensions.support import model, numbers

PLUGIN = """
from torch import Tensor
from sd_mecha.extensions import merge_spaces, model_configs, model_formats
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from sd_mecha.extensions.model_configs import ModelConfigImpl

model_configs.register(ModelConfigImpl("plugged-config", {"main": {"x": None, "y": None}}))
merge_spaces.register_merge_space("plugged_space")

@merge_method
def plugged_double(a: Parameter(Tensor, None, "plugged-config")) -> Return(Tensor, None, "plugged-config"):
    return a * 2

@model_formats.register_model_format
class plugged_format(model_formats.ModelFormat):
    def matches(self, path):
        return path.suffix == ".plugged"
    def get_read_dict(self, path, buffer_size):
        import torch
        return {"x": torch.tensor([21.0])}
"""

CALLABLE = """
def setup():
    from sd_mecha.extensions import merge_spaces
    merge_spaces.register_merge_space("space_of_callable")
"""

ENTRY_POINTS = """
[sd_mecha]
first = broken_plugin
second = good_plugin
third = callable_plugin:setup
fourth = callable_plugin:no_such_name
fifth = duplicate_plugin
"""

PROGRAM = """
import json, logging, sys
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append([record.levelname, record.getMessage(), str(record.exc_info and record.exc_info[1])])
logging.getLogger("sd_mecha").addHandler(Keep())
import sd_mecha
from sd_mecha.extensions import merge_methods, merge_spaces, model_configs, model_formats
double = merge_methods.resolve("plugged_double")
merged = sd_mecha.merge(double(sd_mecha.model(sys.argv[1])), output_dtype=None, tqdm=None)
json.dump({
    "x": merged["x"].tolist(),
    "config": model_configs.resolve("plugged-config").identifier,
    "listed": "plugged-config" in [c.identifier for c in model_configs.get_all_base()],
    "spaces": [s.identifier for s in merge_spaces.get_all()],
    "formats": [f.identifier for f in model_formats.get_all()],
    "recipe": merged["__metadata__"]["mecha_recipe"],
    "builtin": merge_methods.resolve("weighted_sum").identifier,
    "records": records,
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process with a third-party distribution on its path sees."""
    site = tmp_path_factory.mktemp("site")
    (site / "good_plugin.py").write_text(PLUGIN)
    (site / "broken_plugin.py").write_text("raise ZeroDivisionError('of the plug-in')")
    (site / "callable_plugin.py").write_text(CALLABLE)
    (site / "duplicate_plugin.py").write_text(
        "from sd_mecha.extensions import merge_spaces\nmerge_spaces.register_merge_space('weight')"
    )
    info = site / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "model.plugged").write_bytes(b"anything")
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site / "model.plugged")],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_methods_configs_formats_and_spaces_are_found(told: dict[str, Any]) -> None:
    assert told["x"] == [42.0]
    assert told["config"] == "plugged-config"
    assert told["listed"]
    assert "plugged_space" in told["spaces"]
    assert "plugged_format" in told["formats"]
    assert 'merge "plugged_double"' in told["recipe"]


def test_an_entry_point_may_be_a_callable(told: dict[str, Any]) -> None:
    assert "space_of_callable" in told["spaces"]


def test_a_broken_plug_in_is_logged_by_name_and_left_out(told: dict[str, Any]) -> None:
    errors = {message.split()[1]: (message, error) for level, message, error in told["records"] if level == "ERROR"}
    assert errors.keys() == {"'first'", "'fourth'", "'fifth'"}
    message, error = errors["'first'"]
    assert "broken_plugin" in message
    assert "of distribution 'third-party'" in message
    assert "failed to load and is left out" in message
    assert error == "of the plug-in"
    assert "'weight' is already registered" in errors["'fifth'"][1]


def test_what_is_built_in_works_all_the_same(told: dict[str, Any]) -> None:
    assert told["builtin"] == "weighted_sum"
    assert told["spaces"][:3] == ["weight", "delta", "param"]
    assert "safetensors" in told["formats"]


# --- a format written for sd-mecha 1 ----------------------------------------------------------------------------------


class JsonDict(dict[str, torch.Tensor]):
    """Tensors that are written when the mapping is closed."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        super().__init__()
        self._path, self._facts = path, facts

    def close(self) -> None:
        self._path.write_text(json.dumps({**self._facts, "tensors": {k: t.tolist() for k, t in self.items()}}))


class JsonFormat:
    """Knows only what release 1 asked of a format."""

    def matches(self, path: Path) -> bool:
        return path.suffix == ".json"

    def get_read_dict(self, path: Path, buffer_size: int) -> Any:
        return {k: torch.tensor(t) for k, t in json.loads(path.read_text())["tensors"].items()}

    def get_write_dict(self, path: Path, model_config: Any, mecha_recipe: str, buffer_size: int) -> Any:
        return JsonDict(path, {"keys": list(model_config.keys()), "recipe": mecha_recipe})


@pytest.fixture
def _json_format() -> Iterator[None]:
    made = type("JsonModelFormat", (JsonFormat, ModelFormat), {})
    model_formats.register_model_format(made, identifier="json_of_test")
    yield
    model_formats._registry.remove("json_of_test")


@pytest.mark.usefixtures("_json_format")
@pytest.mark.parametrize("threads", [0, 2])
def test_a_format_of_release_1_is_read_and_written(tmp_path: Path, threads: int) -> None:
    source, output = tmp_path / "a.json", tmp_path / "out.json"
    source.write_text(json.dumps({"tensors": {"x": [1.0, 2.0], "y": [[3.0], [4.0]], "z": 5.0}}))
    b = model(x=[3.0, 4.0], y=[[5.0], [6.0]], z=7.0)
    recipe = sd_mecha.weighted_sum(sd_mecha.model(source), b, alpha=0.5)
    expected = {"x": [2.0, 3.0], "y": [[4.0], [5.0]], "z": 6.0}
    assert numbers(recipe, threads=threads) == expected
    recipe = sd_mecha.n_average(sd_mecha.model(source))
    sd_mecha.merge(recipe, output=output, threads=threads, tqdm=None)
    written = json.loads(output.read_text())
    assert written["tensors"] == {"x": [1.0, 2.0], "y": [[3.0], [4.0]], "z": 5.0}
    assert sorted(written["keys"]) == ["x", "y", "z"]
    assert numbers(sd_mecha.deserialize(written["recipe"])) == {"x": [1.0, 2.0], "y": [[3.0], [4.0]], "z": 5.0}
