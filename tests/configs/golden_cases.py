"""Runs the numeric cases of conversions and LoRAs, from whatever folder they lie in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sd_mecha
from sd_mecha.errors import MechaError
from sd_mecha.extensions import merge_methods, model_configs

SAMPLE = 24
"""Rows and columns of each output that are kept."""


def cases(folder: Path) -> list[Any]:
    """The cases of a folder, as parameters; none where there is no such folder."""
    path = folder / "manifest_public.json"
    found = json.loads(path.read_text())["cases"] if path.is_file() else []
    return [pytest.param(case, id=case["id"]) for case in found]


def check_conversion(case: dict[str, Any], folder: Path) -> None:
    """Convert a few tensors and compare with what 1.1.8 made of them, or with the key map where it raised."""
    method = merge_methods.resolve(case["method"])
    if "input_inline" in case:
        source: Any = sd_mecha.literal(case["input_inline"], case["source"])
        result = _merged(method(source), merge_dtype=torch.float32)
        assert len(result) == case["n_output"]
        for key, value in case["output_inline_sample"].items():
            assert result[key].item() == pytest.approx(value, rel=1e-7), key
        return
    tensors = load_file(folder / case["input"])
    result = _merged(method(sd_mecha.model(tensors, case["source"])), merge_dtype=torch.float32)
    if "output" in case:
        expected = load_file(folder / case["output"])
        assert result.keys() == expected.keys()
    else:
        expected = _renamed(method, tensors, case)
        assert result.keys() == expected.keys()
        assert len(result) == case["n_input"]
    config = model_configs.resolve(case["target"])
    for key, tensor in expected.items():
        if key.endswith("in_proj_bias"):  # 1.1.8 wrote them in three rows, in a shape that no program reads
            tensor = tensor.flatten()
        assert result[key].shape == config.keys()[key].shape, key
        assert torch.equal(result[key], tensor.float()), key


def _renamed(method: Any, tensors: dict[str, torch.Tensor], case: dict[str, Any]) -> dict[str, torch.Tensor]:
    (param,) = method.get_param_names().args
    target = model_configs.resolve(case["target"])
    key_map = method.build_key_map({param: model_configs.resolve(case["source"])}, target)
    sources = {key: relation.clauses[0].by_param[param] for key, relation in key_map.items()}
    return {key: tensors[name] for key, (name,) in sources.items() if name in tensors}


def check_lora(case: dict[str, Any], folder: Path) -> None:
    """Turn a LoRA of one module into a delta and compare with the numbers of 1.1.8."""
    tensors = load_file(folder / case["input"])
    recipe = sd_mecha.convert(sd_mecha.model(tensors, case["config"]), case["convert_to"])
    options: dict[str, Any] = {"merge_dtype": getattr(torch, case["merge_dtype"]), "strict_merge_space": "delta"}
    if case["error"] is not None and "known_bug" not in case:
        with pytest.raises(MechaError):
            _merged(recipe, **options)
        return
    result = _merged(recipe, **options)
    if case["error"] is not None:  # the conversion to the layout of checkpoints raised; the delta was right
        base = sd_mecha.convert(sd_mecha.model(tensors, case["config"]), case["config"].rsplit("_", 2)[0])
        (found,), (wanted,) = result.values(), _merged(base, **options).values()
        assert torch.equal(found, wanted)
        return
    expected = load_file(folder / case["output"])
    assert result.keys() == case["outputs"].keys()
    for key, numbers in case["outputs"].items():
        tensor = result[key].double()
        assert list(tensor.shape) == numbers["shape"]
        sample = tensor.reshape(tensor.shape[0], -1)[:SAMPLE, :SAMPLE]
        torch.testing.assert_close(sample, expected[key].double(), **case["tolerance"])
        assert tensor.norm().item() == pytest.approx(numbers["l2"], rel=1e-4, abs=1e-5)
        assert tensor.sum().item() == pytest.approx(numbers["sum"], rel=1e-4, abs=1e-3 * (1 + numbers["l2"]))


def _merged(recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    options = {"strict_merge_space": None, "output_dtype": None, "threads": 0, **options}
    result = sd_mecha.merge(recipe, **options)
    return {key: value for key, value in result.items() if key != "__metadata__"}
