"""Shuffled channels: the function of a network stays, `rebasin` undoes `randperm`, and both agree with sd-mecha 1."""

from __future__ import annotations

import hashlib
import sys
from functools import partial
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sd_mecha
from sd_mecha.builtin.methods.assignment import best_match
from sd_mecha.builtin.methods.permutation_spec import Group, find_groups, permutable
from sd_mecha.builtin.methods.permutations import aligning_order, permuted, random_order
from sd_mecha.errors import MechaError
from sd_mecha.extensions import merge_methods, model_configs
from sd_mecha.extensions.key_map import build_key_map
from tests.methods.golden_sdxl import Tensors, cases, golden_input, merged
from tests.methods.networks import PARTS, compute, random_state

IMPLEMENTATIONS = {
    "sdxl-sgm": ("randperm_sdxl_sgm", "rebasin_sdxl_sgm"),
    "sd1-ldm": ("randperm_sd1_ldm", "rebasin_sd1_ldm"),
}
KEEPS_ITS_FUNCTION = [part for part in PARTS if part != "sdxl image attention"]


def groups(config: str) -> list[Group]:
    return list({group.keys: group for group in permutable(config).values()}.values())


def model(tensors: Tensors, config: str) -> Any:
    return sd_mecha.model(tensors, config=config)


@pytest.mark.parametrize("case", cases("randperm"), ids=lambda case: str(case["seed"]))
def test_a_seed_gives_the_permutations_of_sd_mecha_1(case: dict[str, Any]) -> None:
    x = golden_input()
    shuffled = sd_mecha.randperm(model(x, "sdxl-sgm"), seed=case["seed"])
    got = merged(shuffled)
    for key, expected in case["permutations"].items():
        assert torch.equal(got[key], x[key].index_select(expected["axis"], torch.tensor(expected["perm"])))
    back = merged(sd_mecha.rebasin(shuffled, model(x, "sdxl-sgm")))
    assert all(torch.equal(back[key], x[key]) for key in x)


def test_all_permutations_of_a_seed_are_those_of_sd_mecha_1() -> None:
    digest = hashlib.sha256()
    of_key: dict[str, list[torch.Tensor]] = {}
    shapes = {key: metadata.shape for key, metadata in model_configs.resolve("sdxl-sgm").keys().items()}
    for group in groups("sdxl-sgm"):
        for key in group.keys:
            of_key[key] = [torch.arange(length) for length in shapes[key]]
        for runs in group.runs:
            channels = (random_order(runs, 7) + torch.arange(runs.count)[:, None] * runs.size).flatten()
            for axis in runs.axes:
                of_key[axis.key][axis.dim][axis.start : axis.start + len(channels)] = channels + axis.start
    for key in sorted(of_key):
        digest.update(key.encode())
        for index in of_key[key]:
            digest.update(index.to(torch.int32).numpy().tobytes())
    assert len(of_key) == 1088
    assert digest.hexdigest() == "740c2d2f35dede6821b26e843e72dfdefb7b7373fddf120095d87042deaa3e3c"


@pytest.mark.parametrize("method", IMPLEMENTATIONS["sdxl-sgm"])
def test_the_key_map_is_that_of_sd_mecha_1(method: str) -> None:
    implementation = merge_methods.resolve(method)
    config = model_configs.resolve("sdxl-sgm")
    names = implementation.declaration.names.args
    assert implementation.map_keys is not None
    made = build_key_map(implementation.map_keys, dict.fromkeys(names, config), config)
    for relation in made.relations:
        (clause,) = relation.clauses
        assert dict(clause.by_param) == dict.fromkeys(names, relation.outputs)
    text = "\n".join(sorted(" ".join(relation.outputs) for relation in made.relations))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "e3b860c455cf015f19e6caf6ecb1ead8505d02d740ec83b648fb89327ac8beb7"
    )


@pytest.mark.parametrize("config", IMPLEMENTATIONS)
def test_no_channel_is_shuffled_twice_and_sizes_fit(config: str) -> None:
    shapes = {key: metadata.shape for key, metadata in model_configs.resolve(config).keys().items()}
    taken: dict[tuple[str, int], list[tuple[int, int]]] = {}
    numbers: list[int] = []
    for group in groups(config):
        for runs in group.runs:
            numbers += runs.numbers
            for axis in runs.axes:
                stop = axis.start + runs.size * runs.count
                assert stop <= shapes[axis.key][axis.dim]
                taken.setdefault((axis.key, axis.dim), []).append((axis.start, stop))
    assert sorted(numbers) == list(range(len(numbers)))
    for spans in taken.values():
        spans.sort()
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


@pytest.mark.parametrize("part", KEEPS_ITS_FUNCTION)
def test_a_shuffled_layer_computes_the_same_and_is_recovered(part: str) -> None:
    state, config = random_state(part, seed=1), PARTS[part][0]
    shuffled = merged(sd_mecha.randperm(model(state, config), seed=4))
    assert any(not torch.equal(shuffled[key], tensor) for key, tensor in state.items())
    assert torch.allclose(compute(part, shuffled), compute(part, state), rtol=1e-10, atol=1e-12)
    recovered = merged(sd_mecha.rebasin(model(shuffled, config), model(state, config)))
    assert all(torch.equal(recovered[key], tensor) for key, tensor in state.items())


def test_unet_attention_of_sdxl_is_shuffled_across_heads_as_in_sd_mecha_1() -> None:
    state = random_state("sdxl image attention", seed=1)
    shuffled = merged(sd_mecha.randperm(model(state, "sdxl-sgm"), seed=4))
    before, after = (compute("sdxl image attention", x) for x in (state, shuffled))
    assert not torch.allclose(after, before, rtol=1e-3)
    recovered = merged(sd_mecha.rebasin(model(shuffled, "sdxl-sgm"), model(state, "sdxl-sgm")))
    assert all(torch.equal(recovered[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("part", ["sd1 cross-attention", "sdxl stacked attention", "sd1 gates"])
def test_rebasin_keeps_the_function_and_comes_closer(part: str) -> None:
    pytest.importorskip("scipy")
    a, ref, config = random_state(part, seed=1), random_state(part, seed=2), PARTS[part][0]
    aligned = merged(sd_mecha.rebasin(model(a, config), model(ref, config)))
    assert torch.allclose(compute(part, aligned), compute(part, a), rtol=1e-10, atol=1e-12)

    def distance(x: Tensors) -> float:
        return sum(float((x[key] - ref[key]).square().sum()) for key in ref)

    assert distance(aligned) < 0.999 * distance(a)


@settings(max_examples=20, database=None)
@given(width=st.integers(1, 6), heads=st.integers(1, 3), seed=st.integers(-(2**70), 2**70))
def test_networks_of_any_size_are_recovered(width: int, heads: int, seed: int) -> None:
    inner, outer = width * heads, 5
    shapes = {
        "x.attn1.to_q.weight": (inner, outer),
        "x.attn1.to_k.weight": (inner, outer),
        "x.attn1.to_v.weight": (inner, outer),
        "x.attn1.to_out.0.weight": (outer, inner),
        "x.ff.net.0.proj.weight": (2 * inner, outer),
        "x.ff.net.0.proj.bias": (2 * inner,),
        "x.ff.net.2.weight": (outer, inner),
    }
    generator = torch.Generator().manual_seed(seed % 2**32)
    x = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    for group in find_groups(shapes, lambda width: 1, lambda width: heads):
        shuffled = permuted(x, group.keys, group, partial(random_order, seed=seed))
        recovered = permuted(shuffled, group.keys, group, partial(aligning_order, shuffled, x))
        assert all(torch.equal(recovered[key], x[key]) for key in group.keys)


@settings(max_examples=40, database=None)
@given(size=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_a_match_is_the_best_of_all(size: int, seed: int) -> None:
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(4).round()
    totals = [sum(float(scores[i, p[i]]) for i in range(size)) for p in permutations(range(size))]
    found = best_match(scores).tolist()
    assert sorted(found) == list(range(size))
    assert sum(float(scores[i, j]) for i, j in enumerate(found)) == max(totals)


def test_without_scipy_only_clear_matches_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert best_match(torch.tensor([[1.0, 2.0], [3.0, 1.0]])).tolist() == [1, 0]
    with pytest.raises(MechaError, match=r"pip install 'sd-mecha\[permutations\]'"):
        best_match(torch.tensor([[5.0, 4.0], [4.0, 1.0]]))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        best_match(torch.tensor([[float("nan"), 4.0], [4.0, 1.0]]))


def test_a_seed_is_drawn_once_and_stands_in_the_recipe() -> None:
    x = model(random_state("sd1 text attention", seed=1), "sd1-ldm")
    first, second = sd_mecha.randperm(x), sd_mecha.randperm(x)
    key = next(key for key in merged(first) if key.endswith("q_proj.weight"))
    assert torch.equal(merged(first)[key], merged(first)[key])
    assert not torch.equal(merged(first)[key], merged(second)[key])


def test_what_belongs_to_no_group_stays_and_incomplete_groups_are_left_out() -> None:
    state = random_state("sd1 self-attention", seed=1)
    del state[next(key for key in state if key.endswith("to_v.weight"))]
    got = merged(sd_mecha.randperm(model(state, "sd1-ldm"), seed=1))
    assert {key.split("attn1.")[1] for key in got} == {"to_q.weight", "to_k.weight", "to_out.0.bias"}
    assert all(torch.equal(tensor, state[key]) for key, tensor in got.items() if key.endswith("bias"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_files_are_kept(dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in random_state("sd1 text attention", seed=1).items()}
    shuffled = sd_mecha.randperm(model(state, "sd1-ldm"), seed=1)
    recovered = merged(sd_mecha.rebasin(shuffled, model(state, "sd1-ldm")))
    assert all(torch.equal(recovered[key], tensor) and recovered[key].dtype == dtype for key, tensor in state.items())
