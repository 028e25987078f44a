from __future__ import annotations

import pytest
import safetensors.torch
import torch

from sd_mecha.errors import OptionError
from sd_mecha.storage.dtypes import (
    FLOAT4,
    FROM_SAFETENSORS,
    IS_STORAGE_ONLY,
    TO_SAFETENSORS,
    dtype_name,
    is_integral,
    parse_dtype,
)


def test_table_is_a_bijection():
    assert {TO_SAFETENSORS[dtype]: dtype for dtype in TO_SAFETENSORS} == FROM_SAFETENSORS
    assert len(TO_SAFETENSORS) == len(FROM_SAFETENSORS)


@pytest.mark.parametrize("dtype", TO_SAFETENSORS, ids=str)
def test_names_agree_with_the_reference_implementation(dtype):
    tensor = torch.zeros(16, dtype=torch.uint8).view(dtype)
    header = safetensors.torch.save({"a": tensor})
    assert f'"dtype":"{TO_SAFETENSORS[dtype]}"'.encode() in header


def test_every_dtype_of_the_reference_implementation_is_known():
    assert set(safetensors.torch._SIZE) <= set(TO_SAFETENSORS)


@pytest.mark.parametrize("dtype", [dtype for dtype in TO_SAFETENSORS if dtype is not FLOAT4], ids=str)
def test_names_round_trip(dtype):
    assert parse_dtype(dtype_name(dtype)) is dtype
    assert parse_dtype(str(dtype)) is dtype
    assert parse_dtype(TO_SAFETENSORS[dtype]) is dtype
    assert parse_dtype(dtype) is dtype


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("fp16", torch.float16),
        ("FP32", torch.float32),
        (" bf16 ", torch.bfloat16),
        ("half", torch.float16),
        ("torch.float16", torch.float16),
        ("float8_e4m3fn", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("bool", torch.bool),
    ],
)
def test_common_names(text, dtype):
    assert parse_dtype(text) is dtype


def test_none_stays_none():
    assert parse_dtype(None) is None


def test_near_name_is_suggested():
    with pytest.raises(OptionError, match="did you mean 'float16'"):
        parse_dtype("flaot16")


def test_far_name_suggests_nothing():
    with pytest.raises(OptionError, match="unknown dtype 'xyzzy'; expected a name such as"):
        parse_dtype("xyzzy")


@pytest.mark.parametrize("value", [16, float, ["float16"]])
def test_other_types_are_refused(value):
    with pytest.raises(OptionError, match=r"must be a torch\.dtype"):
        parse_dtype(value)


def test_storage_only_dtypes_are_those_torch_cannot_add():
    for dtype in TO_SAFETENSORS:
        if is_integral(dtype):
            continue
        tensor = torch.zeros(16, dtype=torch.uint8).view(dtype)
        try:
            tensor + tensor
            works = True
        except NotImplementedError:
            works = False
        assert works == (dtype not in IS_STORAGE_ONLY), dtype


def test_integral():
    integral = {dtype_name(dtype) for dtype in TO_SAFETENSORS if is_integral(dtype)}
    assert integral == {"bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))}
