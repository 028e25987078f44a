"""Every kind of adapter, read from a file and applied by `adapter_delta`, against its definition written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_mecha
from sd_mecha.extensions import adapters
from tests.adapters.makers import applied, change, drawn

MATRIX, SQUARE, KERNEL = (8, 4), (4, 4), (8, 4, 3, 3)
SHAPES = [MATRIX, SQUARE, KERNEL]


def delta_of(weight: Tensor, parts: dict[str, Tensor], name: str = "proj") -> Tensor:
    """The change of the weight of one module."""
    base = {f"{name}.weight": weight, "other.weight": drawn(3, 3)}
    found = change(base, {f"{name}.{part}": tensor for part, tensor in parts.items()})
    assert set(found) == {f"{name}.weight"}
    return found[f"{name}.weight"]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora(shape: tuple[int, ...], alpha: float | None) -> None:
    ones = [1] * (len(shape) - 2)
    up, down = drawn(shape[0], 3, *ones), drawn(3, *shape[1:])
    scale = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    found = delta_of(drawn(*shape), {"lora_up.weight": up, "lora_down.weight": down, **scale})
    expected = sum(up[:, r].reshape(-1, *[1] * (len(shape) - 1)) * down[r] for r in range(3))  # a sum of outer products
    close(found, expected * (1.0 if alpha is None else alpha / 3))


def test_lora_of_a_kernel_in_three_factors() -> None:
    up, mid, down = drawn(8, 2, 1, 1), drawn(2, 2, 3, 3), drawn(2, 4, 1, 1)
    found = delta_of(drawn(*KERNEL), {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down})
    x = drawn(1, 4, 5, 5)
    one_after_the_other = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid), up)
    torch.testing.assert_close(torch.conv2d(x, found), one_after_the_other, rtol=1e-4, atol=1e-4)


def test_a_matrix_may_be_stored_as_a_kernel_of_one_pixel_and_the_reverse() -> None:
    up, down = drawn(8, 2), drawn(2, 4)
    stored = {"lora_up.weight": up[..., None, None], "lora_down.weight": down[..., None, None]}
    close(delta_of(drawn(8, 4), stored), up @ down)
    close(delta_of(drawn(8, 4, 1, 1), {"lora_up.weight": up, "lora_down.weight": down})[..., 0, 0], up @ down)


def test_the_bias_of_a_lora_and_its_scale() -> None:
    base = {"proj.weight": drawn(8, 4), "proj.bias": drawn(8)}
    up, down, bias = drawn(8, 2), drawn(2, 4), drawn(8, of="bias")
    parts = {"proj.lora_B.weight": up, "proj.lora_A.weight": down, "proj.lora_B.bias": bias}
    found = change(base, {**parts, "proj.alpha": torch.tensor(4.0)})
    close(found["proj.weight"], 2 * up @ down)
    close(found["proj.bias"], 2 * bias)


def test_lora_of_an_embedding() -> None:
    a, b = drawn(2, 10), drawn(6, 2)
    close(delta_of(drawn(10, 6), {"lora_embedding_A": a, "lora_embedding_B": b}), a.T @ b.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_loha(shape: tuple[int, ...]) -> None:
    rows, columns = flat(shape)
    a1, b1, a2, b2 = drawn(rows, 2, of="1"), drawn(2, columns, of="1"), drawn(rows, 2), drawn(2, columns)
    stored = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)}
    close(delta_of(drawn(*shape), stored), (1.5 * (a1 @ b1) * (a2 @ b2)).reshape(shape))


def test_loha_of_a_kernel_in_six_factors() -> None:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((2, 8), (2, 4), (2, 8), (2, 4))
    stored = {name: drawn(*shape, of=name) for name, shape in zip(names, shapes, strict=True)}
    stored |= {"hada_t1": drawn(2, 2, 3, 3, of="1"), "hada_t2": drawn(2, 2, 3, 3)}
    found = delta_of(drawn(*KERNEL), stored)
    for o, i, y, x in itertools.product(range(8), range(4), range(3), range(3)):
        first, second = (
            stored[f"hada_w{n}_a"][:, o] @ stored[f"hada_t{n}"][:, :, y, x] @ stored[f"hada_w{n}_b"][:, i]
            for n in (1, 2)
        )
        assert found[o, i, y, x].item() == pytest.approx((first * second).item(), abs=1e-4)


def kron(first: Tensor, second: Tensor) -> Tensor:
    """By the definition: blocks of the second, one for each entry of the first."""
    return torch.cat([torch.cat([entry * second for entry in row], 1) for row in first], 0)


@pytest.mark.parametrize(
    ("shape", "second"), [*itertools.product(SHAPES, ("whole", "factored")), (KERNEL, "with a core")]
)
@pytest.mark.parametrize("first", ["whole", "factored"])
def test_lokr(shape: tuple[int, ...], first: str, second: str) -> None:
    rows, columns, kernel = shape[0] // 2, shape[1] // 2, shape[2:]
    stored: dict[str, Tensor] = {"alpha": torch.tensor(1.0)}
    if first == "whole":
        w1 = stored["lokr_w1"] = drawn(2, 2)
    else:
        stored |= {"lokr_w1_a": drawn(2, 2, of="a"), "lokr_w1_b": drawn(2, 2, of="b")}
        w1 = stored["lokr_w1_a"] @ stored["lokr_w1_b"]
    if second == "whole":
        w2 = stored["lokr_w2"] = drawn(rows, columns, *kernel)
    elif second == "factored":
        a, b = drawn(rows, 2), drawn(2, columns * torch.Size(kernel).numel())
        stored |= {"lokr_w2_a": a, "lokr_w2_b": b}
        w2 = (a @ b).reshape(rows, columns, *kernel)
    else:
        core, a, b = drawn(2, 2, *kernel), drawn(2, rows), drawn(2, columns)
        stored |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        w2 = torch.stack([a.T @ core[:, :, y, x] @ b for y in range(3) for x in range(3)], -1).unflatten(-1, (3, 3))
    scale = 1.0 if first == second == "whole" else 0.5  # relative to the rank, where anything has one
    close(delta_of(drawn(*shape), stored), scale * kron(w1, w2))


@pytest.mark.parametrize("style", ["dora_scale", "dora_scale of columns", "lora_magnitude_vector"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dora(shape: tuple[int, ...], style: str) -> None:
    weight, (rows, columns) = drawn(*shape), flat(shape)
    ones = [1] * (len(shape) - 2)
    up, down = drawn(rows, 2, *ones), drawn(2, *shape[1:])
    changed = weight + (up.reshape(rows, 2) @ down.reshape(2, columns)).reshape(shape)
    by_columns = style.endswith("columns")
    vectors = changed.transpose(0, 1) if by_columns else changed
    lengths = drawn(vectors.shape[0]).abs()
    expected = torch.stack([v / v.norm() * m for v, m in zip(vectors, lengths, strict=True)])
    expected = expected.transpose(0, 1) if by_columns else expected
    if style == "lora_magnitude_vector":
        shaped = lengths if not ones else lengths.reshape(1, -1, 1, 1)  # as PEFT stores them
        parts = {"lora_B.weight": up, "lora_A.weight": down, style: shaped}
    else:
        shaped = lengths.reshape(1, -1, *ones) if by_columns else lengths.reshape(-1, 1, *ones)
        parts = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": shaped}
    close(weight + delta_of(weight, parts), expected)


def test_dora_of_other_kinds() -> None:
    weight, lengths = drawn(8, 4), drawn(8, 1).abs()
    w1, w2 = drawn(2, 2), drawn(4, 2)
    found = delta_of(weight, {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": lengths})
    changed = weight + kron(w1, w2)
    close(weight + found, changed / changed.norm(dim=1, keepdim=True) * lengths)


def rotation(block: Tensor, bound: float | None = None) -> Tensor:
    """The Cayley transform of a skew-symmetric matrix."""
    one = torch.eye(block.shape[-1])
    return torch.linalg.solve(one - (block - block.mT), one + (block - block.mT), left=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rescaled", [False, True])
def test_oft(shape: tuple[int, ...], rescaled: bool) -> None:
    weight = drawn(*shape)
    blocks = drawn(shape[0] // 2, 2, 2) / 3
    factors = drawn(shape[0], *[1] * (len(shape) - 1)) if rescaled else None
    parts = {"oft_blocks": blocks, **({} if factors is None else {"rescale": factors})}
    found = weight + delta_of(weight, parts)
    turned = (torch.block_diag(*map(rotation, blocks)).mT @ weight.flatten(1)).reshape(shape)
    close(found, turned if factors is None else turned * factors)
    if factors is None:
        close(found.flatten(1).mT @ found.flatten(1), weight.flatten(1).mT @ weight.flatten(1))  # lengths and angles


def test_the_bound_of_a_rotation() -> None:
    weight, blocks, alpha = drawn(8, 4), drawn(4, 2, 2), 0.01
    skew = blocks - blocks.mT
    assert skew.norm() > 8 * alpha
    found = delta_of(weight, {"oft_blocks": blocks, "alpha": torch.tensor(alpha)})
    shortened = blocks * (8 * alpha / skew.norm())
    close(found, torch.block_diag(*map(rotation, shortened)).mT @ weight - weight)
    loose = delta_of(weight, {"oft_blocks": blocks, "alpha": torch.tensor(1000.0)})
    close(loose, delta_of(weight, {"oft_blocks": blocks}))


def test_boft() -> None:
    weight, stages = drawn(8, 4), drawn(2, 2, 4, 4) / 3
    found = weight + delta_of(weight, {"oft_blocks": stages})
    expected = weight
    for stage, blocks in enumerate(stages):
        apart = 2 * 2**stage
        # rows that lie `apart` from each other become neighbours: (group, pair, place) -> (group, place, pair)
        order = [
            group * 2 * apart + pair * apart + place
            for group in range(8 // (2 * apart))
            for place in range(apart)
            for pair in range(2)
        ]
        permutation = torch.eye(8)[order]
        expected = permutation.mT @ torch.block_diag(*map(rotation, blocks)) @ permutation @ expected
    close(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("on_input", [0, 1])
def test_ia3(shape: tuple[int, ...], on_input: int) -> None:
    weight, size = drawn(*shape), shape[on_input]
    factors = drawn(size)
    found = delta_of(weight, {"weight": factors, "on_input": torch.tensor(on_input)})
    along = [-1 if axis == on_input else 1 for axis in range(len(shape))]
    close(found, weight * factors.reshape(along))


def test_ia3_of_peft_and_its_bias() -> None:
    base = {"proj.weight": drawn(8, 4), "proj.bias": drawn(8)}
    rows, columns = drawn(8, 1), drawn(1, 4)
    found = change(base, {"proj.ia3_l": rows})
    close(found["proj.weight"], base["proj.weight"] * (rows - 1))
    close(found["proj.bias"], base["proj.bias"] * (rows[:, 0] - 1))
    found = change(base, {"proj.ia3_l": columns})
    assert set(found) == {"proj.weight"}  # what comes in is scaled: the bias is not
    close(found["proj.weight"], base["proj.weight"] * (columns - 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("old", [False, True])
def test_glora(shape: tuple[int, ...], old: bool) -> None:
    weight, (rows, columns) = drawn(*shape), flat(shape)
    a1, a2, b1, b2 = drawn(shape[1], 3), drawn(3, shape[1]), drawn(rows, 3), drawn(3, columns)
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    factors = zip(names, (a1, a2, b1, b2), strict=True)
    stored = {f"{name}.weight": tensor for name, tensor in factors} | {"alpha": torch.tensor(1.5)}
    own = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    close(delta_of(weight, stored), 0.5 * (own + (b1 @ b2).reshape(shape)))


def test_oft_of_peft() -> None:
    weight, vectors = drawn(8, 6), drawn(2, 3) / 10
    found = weight + delta_of(weight, {"oft_R.weight": vectors})
    blocks = []
    for a, b, c in vectors:
        q = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]])
        powers = [torch.linalg.matrix_power(q, n) for n in range(5)]
        blocks.append(powers[0] + 2 * (powers[1] + powers[2] + powers[3]) + powers[4])
    close(found, weight @ torch.block_diag(*blocks).mT)


def test_changes_that_are_stored_as_they_are() -> None:
    base = {"proj.weight": drawn(8, 4), "proj.bias": drawn(8), "norm.weight": drawn(4), "norm.bias": drawn(4)}
    base |= {"whole.weight": drawn(2, 2), "scale": drawn(3)}
    stored = {"proj.diff": drawn(8, 4, of="x"), "proj.diff_b": drawn(8, of="x"), "scale.diff": drawn(3, of="x")}
    stored |= {
        "norm.w_norm": drawn(4, of="w"),
        "norm.b_norm": drawn(4, of="b"),
        "whole.set_weight": drawn(2, 2, of="x"),
    }
    found = change(base, stored)
    pairs = zip(("proj.weight", "proj.bias", "scale", "norm.weight", "norm.bias"), stored.values(), strict=False)
    for key, expected in pairs:
        close(found[key], expected)
    close(base["whole.weight"] + found["whole.weight"], stored["whole.set_weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["lora", "dora", "oft"])
def test_files_of_small_dtypes_count_as_the_numbers_that_they_hold(dtype: torch.dtype, kind: str) -> None:
    weight = drawn(8, 4)
    parts = {"lora_up.weight": drawn(8, 2), "lora_down.weight": drawn(2, 4)}
    if kind == "dora":
        parts["dora_scale"] = drawn(8, 1).abs()
    if kind == "oft":
        parts = {"oft_blocks": drawn(2, 4, 4) / 3}
    stored = {part: tensor.to(dtype) for part, tensor in parts.items()}
    exact = {part: tensor.float() for part, tensor in stored.items()}
    assert torch.equal(delta_of(weight, stored), delta_of(weight, exact))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_merge_dtype_is_what_is_computed_in(dtype: torch.dtype) -> None:
    base, parts = {"proj.weight": drawn(8, 4)}, {"proj.oft_blocks": drawn(2, 4, 4) / 3}
    found = applied(base, parts, merge_dtype=dtype)["proj.weight"]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), applied(base, parts)["proj.weight"], rtol=0.05, atol=0.05)


def test_strength_and_a_rank_of_its_own_for_each_module() -> None:
    base = {"a.weight": drawn(6, 4, of="a"), "b.weight": drawn(6, 4, of="b"), "c.weight": drawn(2, 2)}
    adapter, expected = {}, dict(base)
    for name, rank, alpha in (("a", 1, 1.0), ("b", 5, 2.0)):
        up, down = drawn(6, rank, of=name), drawn(rank, 4, of=name)
        adapter |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": torch.tensor(alpha),
        }
        expected[f"{name}.weight"] = base[f"{name}.weight"] - 0.5 * alpha / rank * up @ down
    found = applied(base, adapter, alpha=-0.5)
    for key, value in expected.items():
        close(found[key], value)


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": 2}, {"total_buffer_size": 2**20}, {"total_buffer_size": 0}]
)
@pytest.mark.parametrize("kind", ["lora", "loha", "full"])
def test_bits_depend_on_neither_budget_nor_threads(kind: str, options: dict[str, Any]) -> None:
    rows, columns = 700, 1000
    base = {"proj.weight": drawn(rows, columns), "small.weight": drawn(3, 5)}
    factors = {"up": drawn(rows, 8), "down": drawn(8, columns)}
    parts = {
        "lora": {"lora_up.weight": factors["up"], "lora_down.weight": factors["down"]},
        "loha": dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), [*factors.values()] * 2, strict=True)),
        "full": {"diff": drawn(rows, columns, of="diff")},
    }[kind]
    stored = {f"proj.{part}": tensor for part, tensor in parts.items()}
    once, again = applied(base, stored), applied(base, stored, **options)
    assert torch.equal(once["proj.weight"], again["proj.weight"])


def test_a_large_change_is_made_piece_by_piece() -> None:
    base = {"proj.weight": torch.zeros(2048, 2048)}
    adapter = {"proj.lora_up.weight": drawn(2048, 4), "proj.lora_down.weight": drawn(4, 2048)}
    recipe = sd_mecha.apply_adapter(base, adapter)
    with sd_mecha.plan(recipe) as plan:
        assert max(template.whole_bytes for template in plan.templates) < 2048 * 2048
    torch.testing.assert_close(
        applied(base, adapter)["proj.weight"], adapter["proj.lora_up.weight"] @ adapter["proj.lora_down.weight"]
    )


def test_every_kind_is_tested_here() -> None:
    names = {kind.name for kind in adapters.get_all()}
    assert names == {
        *("lora", "lora_bias", "lora_embedding", "loha", "lokr", "oft", "peft_oft", "peft_boft", "glora"),
        *("ia3", "peft_ia3", "peft_ia3_bias", "full", "full_bias", "norm", "norm_bias", "set"),
    }
