"""Models of every kind in one recipe: a file on a web server, a folder of shards, a checkpoint, a GGUF file, a dict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import sd_mecha
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from tests.formats.web_server import serving

fsspec = pytest.importorskip("fsspec")
gguf = pytest.importorskip("gguf")

KEYS = {f"layers.{n}.weight": (64, 96) for n in range(24)} | {"norm.weight": (96,), "large.weight": (900, 1024)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=chance) for key, shape in KEYS.items()}


@pytest.fixture
def models(tmp_path: Path) -> Iterator[list[Any]]:
    """The same five models wherever they lie."""
    folder = tmp_path / "folder"
    folder.mkdir()
    halves = [dict(list(weights(2).items())[:13]), dict(list(weights(2).items())[13:])]
    places = {}
    for number, half in enumerate(halves, start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(half, folder / name)
        places |= dict.fromkeys(half, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"state_dict": weights(3), "epoch": 1}, tmp_path / "last.ckpt")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, tensor in weights(4).items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with serving() as site:
        site.files = {"/remote.safetensors": save(weights(1))}
        yield [site.url("/remote.safetensors"), folder, tmp_path / "last.ckpt", tmp_path / "m.gguf", weights(5)]


def recipe(models: list[Any]) -> sd_mecha.RecipeNode:
    first, second, third, fourth, fifth = map(sd_mecha.model, models)
    return sd_mecha.slerp(sd_mecha.n_average(first, second, third), sd_mecha.weighted_sum(fourth, fifth), alpha=0.3)


def plain(seed_by_seed: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = sd_mecha.merge(recipe(seed_by_seed), output_dtype=None, tqdm=None)
    assert found is not None
    return {key: found[key] for key in KEYS}


def test_they_merge_to_one_file_and_to_shards_with_equal_tensors(tmp_path: Path, models: list[Any]) -> None:
    expected = plain([weights(seed) for seed in range(1, 6)])
    one, many = tmp_path / "out.safetensors", tmp_path / "out"
    options: dict[str, Any] = {"output_dtype": None, "tqdm": None}
    sd_mecha.merge(recipe(models), output=one, **options)
    sd_mecha.merge(recipe(models), output=many, shard_size="200KB", **options)
    shards = sorted(many.glob("*.safetensors"))
    assert len(shards) > 3
    in_shards = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    in_one = load_file(one)
    assert in_one.keys() == in_shards.keys() == KEYS.keys()
    for key in KEYS:
        assert torch.equal(in_one[key], expected[key])
        assert torch.equal(in_shards[key], expected[key])
    assert (many / "config.json").read_text() == '{"model_type": "llama"}'
    assert sd_mecha.verify(many).problems == []


@pytest.mark.parametrize("output", ["out.safetensors", "out.gguf", "out"])
def test_the_bytes_do_not_depend_on_threads_or_memory(tmp_path: Path, models: list[Any], output: str) -> None:
    digests = set()
    for threads, budget in ((1, 256 << 20), (2, 8 << 20), (8, 8 << 20), (8, 256 << 20)):
        path = tmp_path / f"{threads}-{budget}" / output
        path.parent.mkdir()
        options: dict[str, Any] = {"shard_size": "1MB"} if output == "out" else {}
        sd_mecha.merge(
            recipe(models),
            output=path,
            threads=threads,
            total_buffer_size=budget,
            side_files=None,
            tqdm=None,
            **options,
        )
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        digests.add(hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("shards", [False, True])
def test_an_interrupted_merge_of_them_goes_on(tmp_path: Path, models: list[Any], shards: bool) -> None:
    class Countdown:  # not a plain value, which would make it another program each time
        left = 10

    countdown = Countdown()

    @merge_method(register=False, identifier="interrupted")
    def interrupted(
        a: Parameter(torch.Tensor),  # type: ignore[valid-type]
    ) -> Return(torch.Tensor):  # type: ignore[valid-type]
        if not a.is_meta:
            countdown.left -= 1
            if not countdown.left:
                raise KeyboardInterrupt
        return a * 2

    options: dict[str, Any] = {"tqdm": None, "threads": 0, **({"shard_size": "1MB"} if shards else {})}
    broken, whole = tmp_path / ("broken" if shards else "broken.safetensors"), tmp_path / "whole.safetensors"
    whole = tmp_path / "whole" if shards else whole
    node = interrupted(recipe(models))
    with pytest.raises(KeyboardInterrupt):
        sd_mecha.merge(node, output=broken, resume=True, **options)
    assert not broken.exists()
    done = -countdown.left
    sd_mecha.merge(node, output=broken, resume=True, **options)
    assert -countdown.left - done < len(KEYS)  # some were not computed again
    sd_mecha.merge(node, output=whole, **options)
    pairs = [(broken, whole)] if not shards else [(broken / p.name, p) for p in whole.iterdir()]
    for found, expected in pairs:
        assert found.read_bytes() == expected.read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
