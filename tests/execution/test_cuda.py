"""The same laws on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.extensions.merge_methods import Parameter, Return, StateDict, merge_method
from tests.execution import support
from tests.execution.support import file_bytes, merged, model_term, tensor, tiles

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

NAMES = ("elementwise", "average", "streamed", "ties", "whole", "whole of loads", "rows", "stack", "cast")
KEYS = {"w": (300, 2000), "b": (7,), "n": ()}


def terms(*dtypes: torch.dtype) -> list[support.Term]:
    return [model_term({k: tensor(s, d, seed=i) for k, s in KEYS.items()}) for i, d in enumerate(dtypes)]


def shapes(a: Any, b: Any, c: Any) -> dict[str, support.Term]:
    s = support
    return {
        "elementwise": s.plus(a, s.difference(b, c)),
        "average": s.average(a, b, c),
        "streamed": s.perpendicular(s.slerp(a, b), c),
        "ties": s.plus(a, s.ties(s.difference(b, a), s.difference(c, a), k=0.3)),
        "whole": s.weighted_sum(s.centre(s.slerp(a, b)), c),
        "whole of loads": s.centre(a),
        "rows": s.slerp(s.rows(s.weighted_sum(a, b)), c),
        "stack": s.stacked(s.slerp(a, b), c),
        "cast": s.weighted_sum(s.half(a), b),
    }


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_cpu(name: str, device: str) -> None:
    term = shapes(*terms(torch.float16, torch.float32, torch.bfloat16))[name]
    got = merged(term.node, merge_device=device)
    for key, wanted in term.values.items():
        assert got[key].device.type == "cpu"
        assert torch.allclose(got[key].float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_workers_and_budget(name: str, tmp_path: Path) -> None:
    term = shapes(*terms(torch.float16, torch.float32, torch.bfloat16))[name]
    outcomes = set()
    for threads, budget in ((0, 1 << 30), (1, 1), (4, 1 << 20), (4, 1 << 28)):
        with tiles(1 << 17, 1 << 14):
            path = tmp_path / "out.safetensors"
            options = {"threads": threads, "total_buffer_size": budget, "merge_device": "cuda"}
            outcomes.add(file_bytes(term.node, path, **options))
    assert len(outcomes) == 1


@pytest.mark.parametrize("output_device", ["cpu", "cuda", None])
def test_results_lie_where_they_were_asked_to(output_device: str | None) -> None:
    a, b, _ = terms(*[torch.float32] * 3)
    recipe = sd_mecha.weighted_sum(a.node, b.node)
    wanted = "cuda" if output_device is None else output_device
    got = merged(recipe, merge_device="cuda", output_device=output_device)
    assert {v.device.type for v in got.values()} == {wanted}
    for _, value in sd_mecha.stream(recipe, merge_device="cuda", output_device=output_device):
        assert value.device.type == wanted


def test_models_on_the_gpu_are_read_from_there() -> None:
    state = {k: tensor(s).cuda() for k, s in KEYS.items()}
    got = merged(sd_mecha.n_average(sd_mecha.model(state), sd_mecha.model(state)), merge_device="cpu")
    assert all(torch.equal(got[k], state[k].cpu()) for k in KEYS)


def test_every_argument_lies_on_the_device_or_is_a_number() -> None:
    seen: list[tuple[str, int]] = []

    @merge_method(register=False)
    def look(
        a: Parameter(Tensor), *rest: Parameter(StateDict[Tensor]), alpha: Parameter(Tensor) = 0.5, **kwargs: Any
    ) -> Return(Tensor):
        for t in (a, *(r[kwargs["key"]] for r in rest), alpha):
            if not t.is_meta:
                seen.append((t.device.type, t.dim()))
        return a * alpha

    a, b, c = terms(torch.float16, torch.float32, torch.bfloat16)
    merged(look(support.slerp(a, b).node, c.node, support.slerp(b, c).node), merge_device="cuda")
    assert seen
    assert all(device == "cuda" or dim == 0 for device, dim in seen)


def test_a_step_may_run_elsewhere() -> None:
    a, b, _ = terms(*[torch.float32] * 3)
    recipe = sd_mecha.weighted_sum(a.node, b.node)
    wanted = merged(recipe)
    for merge_device, step_device in (("cpu", "cuda"), ("cuda", "cpu")):
        got = merged(recipe.to(device=step_device), merge_device=merge_device)
        assert all(torch.allclose(got[k], wanted[k], atol=1e-5) for k in KEYS)


def test_integers_and_nan_as_on_the_cpu() -> None:
    ids = torch.arange(5000) + 2**60
    bad = tensor((5000,))
    bad[4999] = float("nan")
    a = sd_mecha.model({"ids": ids, "w": bad, "v": tensor((3,))})
    b = sd_mecha.model({"ids": ids.flip(0), "w": tensor((5000,), seed=1), "v": tensor((3,))})
    got = merged(sd_mecha.slerp(a, b) | b, merge_device="cuda")
    assert torch.equal(got["ids"], ids)
    assert torch.equal(got["w"], tensor((5000,), seed=1))


def test_the_calling_thread_keeps_its_stream() -> None:
    before = torch.cuda.current_device(), torch.cuda.current_stream()
    a, b, _ = terms(*[torch.float32] * 3)
    merged(sd_mecha.weighted_sum(a.node, b.node), merge_device="cuda", threads=0)
    assert (torch.cuda.current_device(), torch.cuda.current_stream()) == before
