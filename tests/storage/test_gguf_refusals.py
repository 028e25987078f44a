"""What GGUF files cannot hold, and the advice that goes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sd_mecha
from sd_mecha.errors import OutputError


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.complex64], ids=str)
def test_what_keeps_its_dtype_is_not_to_be_given_another_one(tmp_path: Path, dtype: torch.dtype) -> None:
    model = {"w": torch.ones(2, 32), "mask": torch.ones(2, dtype=dtype)}
    with pytest.raises(OutputError, match=r"'mask' is .*they hold floats and int8 to int64; leave it out") as caught:
        sd_mecha.merge(sd_mecha.model(model), output=tmp_path / "x.gguf", output_dtype="fp16", tqdm=None)
    assert "float16" not in str(caught.value)
    kept = {"w": model["w"], "mask": torch.ones(2, dtype=torch.int8)}
    sd_mecha.merge(sd_mecha.model(kept), output=tmp_path / "x.gguf", output_dtype="fp16", tqdm=None)
