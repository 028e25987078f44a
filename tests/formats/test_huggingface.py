"""Folders of transformers: merged from shards to shards, and loaded again by the classes that they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_mecha
from sd_mecha.errors import OptionError, OutputError
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
def test_the_result_loads_with_its_class(
    transformers: Any, tmp_path: Path, kind: str, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = two(transformers, kind, tmp_path, tie_word_embeddings=tied)
    out = tmp_path / "out"
    averaged(a, b, output=out, shard_size=6000, output_dtype="bfloat16")
    assert (out / "model.safetensors.index.json").exists()
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert not caplog.records
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
def test_a_tied_and_an_untied_model_make_one_that_loads(
    transformers: Any, tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, tied in (("tied", True), ("untied", False)):
        make(transformers, "llama", 3, tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    order = ["tied", "untied"] if first == "tied" else ["untied", "tied"]
    averaged(*(tmp_path / name for name in order), output=f"{tmp_path}/out/")
    told = [record.getMessage() for record in caplog.records if "'lm_head.weight' is not made" in record.getMessage()]
    assert len(told) == (first == "untied")  # the config of the other says tied already
    assert all("says tie_word_embeddings: true" in text and "is lost" in text for text in told)
    model = loaded(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert "lm_head.weight" not in stored(tmp_path / "out")  # one of the models has none
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("marker", "weights", "kind"),
    [
        ("model_index.json", "unet/diffusion_pytorch_model.safetensors", "diffusers"),
        ("adapter_config.json", "adapter_model.safetensors", "peft"),
    ],
)
def test_a_folder_of_another_format_is_not_replaced(
    transformers: Any, tmp_path: Path, marker: str, weights: str, kind: str
) -> None:
    a, b = two(transformers, "llama", tmp_path)
    out = tmp_path / "out"
    (out / weights).parent.mkdir(parents=True)
    (out / marker).write_text("{}")
    (out / weights).write_bytes(b"theirs")
    step = "output_format='diffusers'" if kind == "diffusers" else "choose another name$"
    with pytest.raises(OutputError, match=rf"'{kind}' stands there.*'huggingface' does not replace it.*{step}"):
        averaged(a, b, output=out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {marker, weights}
    assert (out / weights).read_bytes() == b"theirs"


def test_a_folder_of_the_same_format_or_without_weights_is_replaced(transformers: Any, tmp_path: Path) -> None:
    a, b = two(transformers, "llama", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    for _ in range(2):
        averaged(a, b, output=out)
        loaded(transformers.AutoModelForCausalLM, out)


def test_what_a_folder_lacks_is_told_once(transformers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoilt = make(transformers, "llama", 1)
    for layer in spoilt.model.layers:
        layer.mlp.up_proj.weight.data[0, 0] = torch.inf
    spoilt.save_pretrained(tmp_path / "a")
    averaged(tmp_path / "a", output=f"{tmp_path}/out/")
    (told,) = [record.getMessage() for record in caplog.records if "out' lacks" in record.getMessage()]
    assert "lacks 2 tensors that were left out while merging, such as 'model.layers.0.mlp.up_proj.weight'" in told
    assert "random" in told


def test_a_model_that_loses_every_tensor_replaces_none(transformers: Any, tmp_path: Path) -> None:
    a, _ = two(transformers, "llama", tmp_path)
    spoilt = sd_mecha.model({key: tensor * torch.nan for key, tensor in stored(a).items()})
    before = {path.name: path.read_bytes() for path in a.iterdir()}
    with pytest.raises(OutputError, match=r"every tensor of the model was left out.*nothing was written"):
        sd_mecha.merge(sd_mecha.n_average(sd_mecha.model(a), spoilt), output=a, tqdm=None)
    assert {path.name: path.read_bytes() for path in a.iterdir()} == before


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
