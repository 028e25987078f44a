"""Adapters added up, brought to another rank, and given other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd_mecha
from sd_mecha.adapters.sources import AdapterSource
from sd_mecha.cli import main
from sd_mecha.errors import AdapterError, ParameterError, ShapeError

KERNEL = (12, 8, 3, 3)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


MODULES: dict[str, dict[str, Tensor]] = {
    "lora": {"lora_up.weight": rand(12, 2, 1, 1), "lora_down.weight": rand(2, 8, 3, 3), "alpha": torch.tensor(1.0)},
    "locon in three factors": {
        "lora_up.weight": rand(12, 2, 1, 1),
        "lora_mid.weight": rand(2, 2, 3, 3),
        "lora_down.weight": rand(2, 8, 1, 1),
        "alpha": torch.tensor(3.0),
    },
    "lora without alpha": {"lora_up.weight": rand(12, 3, 1, 1), "lora_down.weight": rand(3, 8, 3, 3)},
    "loha": {
        "hada_w1_a": rand(12, 2),
        "hada_w1_b": rand(2, 72),
        "hada_w2_a": rand(12, 2, seed=1),
        "hada_w2_b": rand(2, 72, seed=1),
        "alpha": torch.tensor(0.5),
    },
    "loha with kernels": {
        "hada_w1_a": rand(2, 12),
        "hada_w1_b": rand(2, 8),
        "hada_w2_a": rand(2, 12, seed=1),
        "hada_w2_b": rand(2, 8, seed=1),
        "hada_t1": rand(2, 2, 3, 3),
        "hada_t2": rand(2, 2, 3, 3, seed=1),
    },
    "lokr": {"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 4, 3, 3), "alpha": torch.tensor(9.0)},
    "tall lokr": {"lokr_w1": rand(2, 4), "lokr_w2": rand(6, 2, 3, 3)},
    "lokr in factors": {
        "lokr_w1_a": rand(3, 2),
        "lokr_w1_b": rand(2, 2),
        "lokr_w2_a": rand(4, 2),
        "lokr_w2_b": rand(2, 36),
        "alpha": torch.tensor(1.0),
    },
    "lokr with a kernel": {
        "lokr_w1": rand(3, 2),
        "lokr_w2_a": rand(2, 4),
        "lokr_w2_b": rand(2, 4, seed=1),
        "lokr_t2": rand(2, 2, 3, 3),
        "alpha": torch.tensor(1.0),
    },
}


def adapter(kind: str, module: str = "m") -> dict[str, Tensor]:
    return {f"{module}.{part}": tensor for part, tensor in MODULES[kind].items()}


def lora(
    module: str, shape: tuple[int, int], rank: int, seed: int = 0, dtype: Any = torch.float32
) -> dict[str, Tensor]:
    parts = {"up": rand(shape[0], rank, seed=seed), "down": rand(rank, shape[1], seed=seed)}
    return {f"{module}.lora_{part}.weight": tensor.to(dtype) for part, tensor in parts.items()}


def deltas(found: dict[str, Any], shape: tuple[int, ...] = KERNEL) -> dict[str, Tensor]:
    """What an adapter makes of each of its modules, as the reader of adapters says."""
    with AdapterSource(found) as source:
        return {m.name: kind.delta(source.parts(m, kind), shape, None) for m in source.modules for kind in m.kinds}


def facts(found: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(found["__metadata__"]["mecha_adapter"])
    return told


@pytest.mark.parametrize("kind", MODULES)
def test_each_kind_is_a_lora_exactly(kind: str) -> None:
    made = sd_mecha.combine_adapters([(adapter(kind), 0.5)])
    assert {key.partition(".")[2] for key in made} >= {"lora_up.weight", "lora_down.weight", "alpha"}
    torch.testing.assert_close(deltas(made)["m"], 0.5 * deltas(adapter(kind))["m"], rtol=1e-4, atol=1e-5)


def test_the_sum_of_all_kinds_is_exact_and_ranks_add_up() -> None:
    pairs = [(adapter(kind), 0.25 * i - 1) for i, kind in enumerate(MODULES)]
    made = sd_mecha.combine_adapters(pairs)
    wanted = sum(weight * deltas(parts)["m"] for parts, weight in pairs)
    torch.testing.assert_close(deltas(made)["m"], wanted, rtol=1e-4, atol=1e-4)
    ranks = [facts(sd_mecha.combine_adapters([pair]))["modules"]["m"]["rank"] for pair in pairs]
    assert facts(made)["modules"]["m"] == {"rank": sum(ranks), "error": 0.0}


def test_modules_of_one_adapter_alone_are_kept() -> None:
    made = sd_mecha.combine_adapters([(lora("a", (4, 3), 1), 2.0), lora("b", (5, 6), 2)])
    assert made["a.alpha"] == 1
    torch.testing.assert_close(deltas(made, (4, 3))["a"], 2 * deltas(lora("a", (4, 3), 1), (4, 3))["a"])
    torch.testing.assert_close(deltas(made, (5, 6))["b"], deltas(lora("b", (5, 6), 2), (5, 6))["b"])


def test_a_change_stored_whole_is_added_whole_and_with_a_rank_becomes_a_lora() -> None:
    whole = {"m.diff": rand(*KERNEL), "m.diff_b": rand(12)}
    made = sd_mecha.combine_adapters([adapter("lora"), (whole, 2.0)])
    wanted = deltas(adapter("lora"))["m"] + 2 * whole["m.diff"]
    torch.testing.assert_close(made["m.diff"], wanted)
    torch.testing.assert_close(made["m.diff_b"], 2 * whole["m.diff_b"])
    low = sd_mecha.combine_adapters([adapter("lora"), (whole, 2.0)], rank=5)
    assert low["m.lora_down.weight"].shape == (5, 8, 3, 3)
    torch.testing.assert_close(low["m.diff_b"], 2 * whole["m.diff_b"])


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_rank_keeps_the_best_approximation(rank: int) -> None:
    parts = [lora("m", (20, 30), 4, seed=1), lora("m", (20, 30), 4, seed=2)]
    made = sd_mecha.combine_adapters(parts, rank=rank)
    whole = sum(deltas(p, (20, 30))["m"] for p in parts)
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(deltas(made, (20, 30))["m"], (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-3, atol=1e-3)
    missing = float(s[rank:].norm() / s.norm())
    assert facts(made)["modules"]["m"] == {"rank": rank, "error": pytest.approx(missing, abs=1e-4)}
    assert facts(made)["error"] == pytest.approx(missing, abs=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("name", ["energy", "frobenius"])
def test_a_share_keeps_as_little_as_it_takes(name: str, share: float) -> None:
    whole = {**lora("m", (20, 30), 8, seed=1), **lora("n", (16, 16), 3, seed=2)}
    arguments: dict[str, Any] = {name: share}
    made = sd_mecha.resize_adapter(whole, **arguments)
    for module, shape, most in (("m", (20, 30), 8), ("n", (16, 16), 3)):
        squares = torch.linalg.svdvals(deltas(whole, shape)[module].double()) ** 2
        kept = squares.cumsum(0) / squares.sum()
        if name == "frobenius":
            kept = kept.sqrt()
        needed = min(int((kept < share - 1e-7).sum()) + 1, most)
        assert made[f"{module}.lora_up.weight"].shape[1] == needed, module


def test_a_rank_bounds_what_a_share_asks_for_and_kernels_may_have_their_own() -> None:
    both = {**lora("m", (20, 30), 8), **{f"k.{part}": t for part, t in MODULES["tall lokr"].items()}}
    made = sd_mecha.resize_adapter(both, energy=0.9999, rank=6, conv_rank=2)
    assert made["m.lora_up.weight"].shape == (20, 6)
    assert made["k.lora_down.weight"].shape == (2, 8, 3, 3)


def test_the_dtype_is_kept_and_the_error_counts_rounding() -> None:
    made = sd_mecha.resize_adapter(lora("m", (20, 30), 4, dtype=torch.bfloat16), rank=4)
    assert {t.dtype for key, t in made.items() if key != "__metadata__"} == {torch.bfloat16}
    assert 1e-4 < facts(made)["error"] < 1e-2
    assert sd_mecha.resize_adapter(lora("m", (20, 30), 4), rank=2, dtype="fp16")["m.alpha"].dtype == torch.float16


def peft(tensors: dict[str, Tensor], before: str) -> dict[str, Tensor]:
    return {
        before + key.replace("lora_up", "lora_B").replace("lora_down", "lora_A"): tensor
        for key, tensor in tensors.items()
    }


def test_styles_meet_where_a_base_says_what_names_mean() -> None:
    base = sd_mecha.model({"blocks.0.attn.q.weight": torch.zeros(6, 4), "blocks.1.attn.q.weight": torch.zeros(6, 4)})
    kohya = {
        **lora("lora_unet_blocks_0_attn_q", (6, 4), 2),
        **lora("lora_unet_blocks_1_attn_q", (6, 4), 1),
    }
    dotted = peft(lora("blocks.0.attn.q", (6, 4), 1, seed=3), "base_model.model.")
    with pytest.raises(AdapterError, match=r"style kohya.*style peft.*give base="):
        sd_mecha.combine_adapters([kohya, dotted])
    for style in ("kohya", "comfyui", "diffusers", "peft"):
        made = sd_mecha.combine_adapters([kohya, (dotted, -2.0)], base=base, style=style)
        got = sd_mecha.merge(sd_mecha.apply_adapter(base, made, strict=True), output_dtype=None)
        wanted = sd_mecha.merge(
            sd_mecha.apply_adapter(sd_mecha.apply_adapter(base, kohya), dotted, alpha=-2.0), output_dtype=None
        )
        assert got is not None
        assert wanted is not None
        assert facts(made)["style"] == style
        for key in ("blocks.0.attn.q.weight", "blocks.1.attn.q.weight"):
            torch.testing.assert_close(got[key], wanted[key])
    assert "lora_unet_blocks_0_attn_q.alpha" in sd_mecha.combine_adapters([kohya, dotted], base=base)


def test_rows_of_fused_weights_meet_their_parts() -> None:
    """Flux has q, k and v in one weight in its own layout, and in three in that of diffusers."""
    fused, single = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_k"
    whole = lora(fused, (9216, 3072), 2)
    part = peft(lora(single, (3072, 3072), 1), "")
    made = sd_mecha.combine_adapters([(whole, 1.0), (part, 0.5)], base="flux-flux")
    up, down = made[f"{fused}.lora_up.weight"], made[f"{fused}.lora_down.weight"]
    assert up.shape == (9216, 3)
    assert not up[:3072, 2].any()
    assert not up[6144:, 2].any()
    torch.testing.assert_close(up[3072:6144, 2:] @ down[2:], 0.5 * deltas(part, (3072, 3072))[single])
    apart = sd_mecha.combine_adapters([whole], base="flux-flux", style="diffusers")
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        module = f"transformer.transformer_blocks.0.attn.{name}"
        rows = whole[f"{fused}.lora_up.weight"][3072 * i : 3072 * (i + 1)]
        torch.testing.assert_close(apart[f"{module}.lora_B.weight"], rows)
        torch.testing.assert_close(apart[f"{module}.lora_A.weight"], whole[f"{fused}.lora_down.weight"])


def test_recipes_of_adapters_and_of_the_result(tmp_path: Path) -> None:
    first, second = lora("a", (4, 3), 2, seed=1), lora("a", (4, 3), 2, seed=2)
    mean = sd_mecha.n_average(sd_mecha.model(first), sd_mecha.model(second))
    made = sd_mecha.combine_adapters([mean])
    torch.testing.assert_close(made["a.lora_up.weight"], (first["a.lora_up.weight"] + second["a.lora_up.weight"]) / 2)
    path = tmp_path / "x.safetensors"
    sd_mecha.merge(sd_mecha.model(made, "structural"), output=path, output_dtype=None)
    assert load_file(path).keys() == made.keys() - {"__metadata__"}
    with safe_open(path, "pt") as file:
        assert "mecha_adapter" in file.metadata()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank": 0}, ParameterError, "rank is 0"),
    ({"rank": 2.5}, ParameterError, "whole number"),
    ({"conv_rank": 0}, ParameterError, "conv_rank is 0"),
    ({"energy": 1.5}, ParameterError, "energy is 1.5"),
    ({"energy": 0.5, "frobenius": 0.5}, ParameterError, "both"),
    ({"style": "kohya"}, ParameterError, "needs base="),
    ({"style": "nope", "base": "sd1-ldm"}, ParameterError, "style is 'nope'"),
    ({"base": "sd1-ldm"}, AdapterError, "no place"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD)
def test_arguments_out_of_range(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sd_mecha.combine_adapters([lora("a", (4, 3), 2)], **arguments)


def test_bad_adapters() -> None:
    good = lora("a", (4, 3), 2)
    with pytest.raises(ParameterError, match="no adapter"):
        sd_mecha.combine_adapters([])
    with pytest.raises(ParameterError, match="weight is nan"):
        sd_mecha.combine_adapters([(good, float("nan"))])
    with pytest.raises(ParameterError, match="got no rank"):
        sd_mecha.resize_adapter(good)
    with pytest.raises(ShapeError, match=r"\(4, 3\).*\(5, 3\)"):
        sd_mecha.combine_adapters([good, lora("a", (5, 3), 2)])
    with pytest.raises(AdapterError, match="no known kind"):
        sd_mecha.combine_adapters([{"a.weight": torch.zeros(2, 2)}])
    with pytest.raises(AdapterError, match="half of a lora"):
        sd_mecha.combine_adapters([{"a.lora_up.weight": torch.zeros(2, 2)}])
    with pytest.raises(AdapterError, match="do not fit each other"):
        sd_mecha.combine_adapters([{**good, "a.lora_down.weight": torch.zeros(3, 3)}])
    with pytest.raises(AdapterError, match="depends on the weight"):
        sd_mecha.combine_adapters([{**good, "a.dora_scale": torch.ones(4, 1)}])


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(lora("a", (8, 6), 2, seed=1), "a.safetensors")
    save_file(lora("a", (8, 6), 2, seed=2), "b=2.safetensors")
    result = call("combine", "a.safetensors=0.5", "b=2.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out.safetensors: 1 modules, rank 4, relative error 0\n"
    made = load_file("out.safetensors")
    assert made["a.lora_up.weight"].shape == (8, 4)
    result = call("resize", "out.safetensors", "--rank", "1", "-o", "small.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "rank 1, relative error 0." in result.stdout
    assert load_file("small.safetensors")["a.lora_up.weight"].shape == (8, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resize", "a.safetensors", "--rank", "0"], "rank is 0"),
        (["resize", "a.safetensors"], "got no rank"),
        (["combine", "a.safetensors=x"], "'x' in 'a.safetensors=x' is no number"),
        (["combine", "missing.safetensors"], "does not exist"),
        (["combine", "a.safetensors", "--style", "peft"], "needs base="),
    ],
)
def test_commands_fail_with_a_message_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(lora("a", (8, 6), 2), "a.safetensors")
    result = call(*arguments, "-o", "out.safetensors")
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert not Path("out.safetensors").exists()


def test_loras_of_an_embedding_are_added() -> None:
    base = {"table.weight": rand(10, 6)}
    loras = [
        {"table.lora_embedding_A": rand(2, 10, seed=n), "table.lora_embedding_B": rand(6, 2, seed=n)} for n in (1, 2)
    ]
    both = sd_mecha.combine_adapters([(loras[0], 1.0), (loras[1], 0.5)], dtype="fp32")
    expected = sum(
        scale * (lora["table.lora_embedding_B"] @ lora["table.lora_embedding_A"]).T
        for scale, lora in zip((1.0, 0.5), loras, strict=True)
    )
    found = sd_mecha.merge(sd_mecha.apply_adapter(sd_mecha.model(base), both, strict=True), output_dtype=None)
    assert found is not None
    torch.testing.assert_close(found["table.weight"] - base["table.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_recipe_of_adapters_ends_in_an_adapter_from_the_command_line(tmp_path: Path) -> None:
    base = {"a.weight": rand(12, 8), "b.weight": rand(8, 8)}
    first, second = lora("a", (12, 8), 2, seed=1), lora("b", (8, 8), 2, seed=2)
    paths = [tmp_path / name for name in ("base.safetensors", "first.safetensors", "second.safetensors")]
    for path, tensors in zip(paths, (base, first, second), strict=True):
        save_file(tensors, path)
    both = sd_mecha.apply_adapter(sd_mecha.apply_adapter(paths[0], paths[1]), paths[2], alpha=0.5)
    recipe, out = tmp_path / "sum.mecha", tmp_path / "sum.safetensors"
    sd_mecha.serialize(both - sd_mecha.model(paths[0]), output=recipe)
    run = CliRunner().invoke(main, ["extract", str(recipe), "--rank", "2", "--dtype", "fp32", "-o", str(out)])
    assert run.exit_code == 0, run.output
    made = sd_mecha.merge(sd_mecha.apply_adapter(sd_mecha.model(base), out, strict=True), output_dtype=None)
    assert made is not None
    for module, scale, parts in (("a", 1.0, first), ("b", 0.5, second)):
        expected = scale * parts[f"{module}.lora_up.weight"] @ parts[f"{module}.lora_down.weight"]
        change = made[f"{module}.weight"] - base[f"{module}.weight"]
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4)
