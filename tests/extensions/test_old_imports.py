"""Import paths of sd-mecha 1."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from sd_mecha.errors import UnknownNameError
from sd_mecha.extensions import merge_methods


def test_built_in_methods_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    method = object()

    def resolve(name: str) -> Any:
        if name == "some_method":
            return method
        raise UnknownNameError(f"unknown merge method: {name!r}; did you mean 'some_method'?")

    monkeypatch.setattr(merge_methods, "resolve", resolve)
    shim = importlib.import_module("sd_mecha.extensions.builtin.merge_methods")
    assert shim.some_method is method
    with pytest.raises(AttributeError, match="did you mean 'some_method'"):
        shim.same_method  # noqa: B018
    assert not hasattr(shim, "__wrapped__")


def test_as_attributes_of_the_package() -> None:
    import sd_mecha.extensions

    assert sd_mecha.extensions.builtin.merge_methods.__name__ == "sd_mecha.extensions.builtin.merge_methods"
    assert sd_mecha.extensions.model_configs.resolve("singleton-mecha").identifier == "singleton-mecha"


def test_matrix_functions() -> None:
    from sd_mecha.extensions.builtin.merge_methods.svd import (
        fractional_orthogonal_matrix_power,
        stiefel_interpolate,
        svd_lowrank,
    )

    eye = torch.eye(3)
    assert torch.allclose(fractional_orthogonal_matrix_power(eye, 0.5), eye)
    assert torch.allclose(stiefel_interpolate(eye[:, :1], eye[:, :1], 0.5), eye[:, :1])
    u, s, vh = svd_lowrank(torch.ones(4, 2), 1)
    assert torch.allclose(u * s @ vh, torch.ones(4, 2))
