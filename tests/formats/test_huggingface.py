"""Folders of transformers: merged from shards to shards, and loaded again by the classes that they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import OptionError
from tests.formats.hugging import averaged, config_of, edit_config, loaded, make, offline, stored

pytestmark = pytest.mark.slow  # the library takes seconds to import

KINDS = ["llama", "qwen3", "mixtral", "t5"]


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    return offline(monkeypatch)


def auto(transformers: Any, kind: str) -> Any:
    return transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM


def two(transformers: Any, kind: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """One model in shards and one in a single file."""
    paths = folder / "a", folder / "b"
    make(transformers, kind, 1, **changes).save_pretrained(paths[0], max_shard_size="4KB")
    make(transformers, kind, 2, **changes).save_pretrained(paths[1])
    assert (paths[0] / "model.safetensors.index.json").exists()
    assert not (paths[1] / "model.safetensors.index.json").exists()
    return paths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_result_loads_with_its_class(transformers: Any, tmp_path: Path, kind: str, tied: bool) -> None:
    a, b = two(transformers, kind, tmp_path, tie_word_embeddings=tied)
    out = tmp_path / "out"
    averaged(a, b, output=out, shard_size=6000, output_dtype="bfloat16")
    assert (out / "model.safetensors.index.json").exists()
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    model = loaded(auto(transformers, kind), out)
    assert model.dtype == torch.bfloat16
    first, second = (auto(transformers, kind).from_pretrained(path).state_dict() for path in (a, b))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, ((first[key] + second[key]) / 2).bfloat16(), rtol=0, atol=0)
    one = averaged(a, b, output_dtype="bfloat16")
    assert one.keys() == stored(out).keys()
    assert all(torch.equal(one[key], tensor) for key, tensor in stored(out).items())


def test_a_result_that_fits_in_one_file_has_no_index(transformers: Any, tmp_path: Path) -> None:
    a, b = two(transformers, "llama", tmp_path)
    averaged(a, b, output=f"{tmp_path}/out/")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    loaded(transformers.AutoModelForCausalLM, tmp_path / "out")


def test_the_index_is_the_one_that_the_library_writes(transformers: Any, tmp_path: Path) -> None:
    a, _ = two(transformers, "llama", tmp_path)
    averaged(a, output=tmp_path / "out", shard_size=6000, output_dtype="float32")
    ours, theirs = (json.loads((p / "model.safetensors.index.json").read_text()) for p in (tmp_path / "out", a))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert '"n_average"' in ours["metadata"]["mecha_recipe"]


def test_side_files_come_from_the_model_that_is_named(transformers: Any, tmp_path: Path) -> None:
    a, b = two(transformers, "llama", tmp_path)
    (b / "chat_template.jinja").write_text("{{ messages }}")
    (b / "extra").mkdir()
    (b / "extra" / "notes.txt").write_text("kept")
    (b / ".cache").mkdir()
    (b / ".cache" / "x.txt").write_text("not kept")
    (b / "optimizer.pt").write_bytes(b"not kept")
    averaged(a, b, output=f"{tmp_path}/first/")
    averaged(a, b, output=f"{tmp_path}/second/", side_files=b / "model.safetensors")
    assert not (tmp_path / "first" / "chat_template.jinja").exists()
    found = {str(p.relative_to(tmp_path / "second")) for p in (tmp_path / "second").rglob("*") if p.is_file()}
    assert found == {
        "chat_template.jinja",
        "config.json",
        "extra/notes.txt",
        "generation_config.json",
        "model.safetensors",
    }


def test_side_files_must_lie_beside_a_config(transformers: Any, tmp_path: Path) -> None:
    a, b = two(transformers, "llama", tmp_path)
    with pytest.raises(OptionError, match=r"side_files=.*there is no config\.json"):
        averaged(a, b, output=f"{tmp_path}/out/", side_files=tmp_path)
    assert not (tmp_path / "out").exists()


def test_only_the_dtype_of_the_config_changes(transformers: Any, tmp_path: Path) -> None:
    a, b = two(transformers, "llama", tmp_path)
    edit_config(a, custom={"x": [1, 1e-7]}, text_config={"torch_dtype": "float32", "n": 1})
    averaged(a, b, output=f"{tmp_path}/out/", output_dtype="bfloat16")
    expected = {**config_of(a), "dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "n": 1}}
    assert config_of(tmp_path / "out") == expected
    averaged(a, b, output=f"{tmp_path}/same/", output_dtype=None)
    assert (tmp_path / "same" / "config.json").read_bytes() == (a / "config.json").read_bytes()


@pytest.mark.parametrize("first", ["tied", "untied"])
def test_a_tied_and_an_untied_model_make_one_that_loads(transformers: Any, tmp_path: Path, first: str) -> None:
    for name, tied in (("tied", True), ("untied", False)):
        make(transformers, "llama", 3, tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    order = ["tied", "untied"] if first == "tied" else ["untied", "tied"]
    averaged(*(tmp_path / name for name in order), output=f"{tmp_path}/out/")
    model = loaded(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert "lm_head.weight" not in stored(tmp_path / "out")  # one of the models has none
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_head_that_the_reference_shares_is_kept_where_the_result_has_its_own(
    transformers: Any, tmp_path: Path
) -> None:
    make(transformers, "llama", 3, tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    make(transformers, "llama", 3, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    averaged(tmp_path / "untied", output=f"{tmp_path}/out/", side_files=tmp_path / "tied", output_dtype="float32")
    model = loaded(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(model.lm_head.weight, stored(tmp_path / "untied")["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_blocks_and_adapters_see_the_same_model_as_in_one_file(transformers: Any, tmp_path: Path) -> None:
    a, b = two(transformers, "llama", tmp_path)
    alpha = sd_mecha.weights({"block:layers.1": 1.0}, default=0.0, strict=True)
    sd_mecha.merge(
        sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=alpha),
        output=f"{tmp_path}/out/", output_dtype="float32", tqdm=None,
    )  # fmt: skip
    result, first, second = stored(tmp_path / "out"), stored(a), stored(b)
    for key, tensor in result.items():
        assert torch.equal(tensor, (second if ".layers.1." in key else first)[key])
