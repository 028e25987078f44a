"""Models on disk, right and wrong, and what must be true after something has failed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.extensions.merge_methods import MergeMethod, Parameter, Return, StateDict, merge_method

OLD = b"what was there before"


def write_model(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def write_header(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def many(path: Path, value: float, count: int = 40, size: int = 1 << 14) -> Path:
    """A model of `count` tensors, 2.6 MB by default."""
    return write_model(path, **{f"k{i:02}": torch.full((size,), value + i) for i in range(count)})


def read(path: Path) -> dict[str, torch.Tensor]:
    """A file as the reference implementation reads it, without a hold on it."""
    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def failing(key: str, error: BaseException) -> MergeMethod:
    """A method that averages two models and fails at one key."""

    @merge_method(register=False, identifier="fragile")
    def fragile(
        a: Parameter(StateDict[torch.Tensor]),  # type: ignore[valid-type]
        b: Parameter(StateDict[torch.Tensor]),  # type: ignore[valid-type]
        **kwargs: Any,
    ) -> Return(torch.Tensor):  # type: ignore[valid-type]
        at = kwargs["key"]
        if at == key and not a[at].is_meta:
            raise error
        return (a[at] + b[at]) / 2

    return fragile


@contextmanager
def refused(*kinds: type[BaseException], says: list[Any] | None = None) -> Iterator[None]:
    """Expect an error of all these kinds whose message mentions all of that, and is no traceback."""
    with pytest.raises(kinds[0]) as caught:
        yield
    for kind in kinds:
        assert isinstance(caught.value, kind)
    assert isinstance(caught.value, sd_mecha.errors.MechaError)
    text = str(caught.value)
    for part in says or []:
        assert str(part) in text, text
    assert "Traceback" not in text


def only_file(path: Path) -> bool:
    """Whether a folder holds that file and nothing else, hidden ones included."""
    return [p.name for p in path.parent.iterdir()] == [path.name]
