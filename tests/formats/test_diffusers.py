"""Pipelines of diffusers: merged as one model of components, and loaded again as a pipeline."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.cli import main
from sd_mecha.errors import ConfigError, FileFormatError, OptionError, OutputError
from sd_mecha.extensions.merge_methods import Parameter, Return, skip_key
from tests.formats.hugging import averaged, offline, stable_diffusion

INDEX = {
    "_class_name": "TinyPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def pipeline(folder: Path, value: float, **index: Any) -> Path:
    """A pipeline of a few numbers, whose UNet is in two files."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({**INDEX, **index}))
    for name in ("unet", "text_encoder", "scheduler"):
        (folder / name).mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "unet" / "config.json").write_text('{"layers": 2}')
    (folder / "text_encoder" / "config.json").write_text('{"torch_dtype": "float32"}')
    weights = {}
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        tensors = {f"down_blocks.{number}.{part}.weight": torch.full((4,), value + number) for part in ("a", "b")}
        save_file(tensors, folder / "unet" / name)
        weights |= dict.fromkeys(tensors, name)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    save_file({"text_model.weight": torch.full((4,), value)}, folder / "text_encoder" / "model.safetensors")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return pipeline(tmp_path / "a", 0.0), pipeline(tmp_path / "b", 8.0)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_pipeline_is_one_model_of_components(two: tuple[Path, Path]) -> None:
    merged = averaged(*two, output_dtype="float32")
    assert set(merged) == {"text_encoder.text_model.weight"} | {
        f"unet.down_blocks.{number}.{part}.weight" for number in (1, 2) for part in ("a", "b")
    }
    assert merged["unet.down_blocks.2.a.weight"].tolist() == [6.0] * 4
    with sd_mecha.plan(sd_mecha.n_average(*map(sd_mecha.model, two))) as planned:
        config = planned.finalized().model_config
    assert config is not None
    assert list(config.components()) == ["unet", "text_encoder"]


def test_its_index_file_stands_for_the_folder(two: tuple[Path, Path]) -> None:
    merged, again = averaged(*two), averaged(*(path / "model_index.json" for path in two))
    assert merged.keys() == again.keys()
    assert all(torch.equal(merged[key], again[key]) for key in merged)


def test_rules_of_weights_know_components_and_blocks(two: tuple[Path, Path]) -> None:
    alpha = sd_mecha.weights({"component:text_encoder": 1.0, "block:down_blocks.2": 0.5}, default=0.0, strict=True)
    recipe = sd_mecha.weighted_sum(*map(sd_mecha.model, two), alpha=alpha)
    merged = sd_mecha.merge(recipe, output_dtype="float32", tqdm=None)
    assert merged is not None
    found = {key: tensor[0].item() for key, tensor in merged.items() if key.endswith(("a.weight", "model.weight"))}
    assert found == {
        "unet.down_blocks.1.a.weight": 1.0,
        "unet.down_blocks.2.a.weight": 6.0,
        "text_encoder.text_model.weight": 8.0,
    }


def test_the_output_is_a_pipeline_like_the_first_one(two: tuple[Path, Path], tmp_path: Path) -> None:
    averaged(*two, output=f"{tmp_path}/out/")
    assert files(tmp_path / "out") == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text()) == {"torch_dtype": "float16"}
    again, merged = averaged(tmp_path / "out", output_dtype=None), averaged(*two)
    assert all(torch.equal(again[key], merged[key]) for key in merged)


def test_large_components_are_written_in_shards(two: tuple[Path, Path], tmp_path: Path) -> None:
    averaged(*two, output=tmp_path / "out", shard_size=20)
    unet = files(tmp_path / "out" / "unet")
    assert "diffusion_pytorch_model-00001-of-00002.safetensors" in unet
    assert "diffusion_pytorch_model.safetensors.index.json" in unet
    assert averaged(tmp_path / "out").keys() == averaged(*two).keys()


def test_a_recipe_read_from_the_output_makes_the_same_again(two: tuple[Path, Path], tmp_path: Path) -> None:
    averaged(*two, output=f"{tmp_path}/out/")
    with sd_mecha.plan(sd_mecha.model(tmp_path / "out")) as planned:
        recipe = planned.metadata()["mecha_recipe"]
    sd_mecha.merge(sd_mecha.deserialize(recipe), output=f"{tmp_path}/again/", tqdm=None)
    for name in files(tmp_path / "out"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_components_that_are_not_made_are_copied_only_on_request(two: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.rmtree(two[1] / "text_encoder")
    with pytest.raises(OutputError, match=r"makes nothing of text_encoder.*side_files="):
        averaged(*two, output=f"{tmp_path}/out/")
    assert not (tmp_path / "out").exists()
    averaged(*two, output=f"{tmp_path}/out/", side_files=two[0])
    copied = tmp_path / "out" / "text_encoder" / "model.safetensors"
    assert copied.read_bytes() == (two[0] / "text_encoder" / "model.safetensors").read_bytes()
    unet = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert unet["down_blocks.1.a.weight"].tolist() == [5.0] * 4


def spoil(folder: Path, component: str, *keys: str) -> None:
    """Put NaN into some tensors of a component, or into all of them."""
    for file in (folder / component).glob("*.safetensors"):
        tensors = load_file(file)
        save_file({k: v * torch.nan if k in keys or not keys else v for k, v in tensors.items()}, file)


def without(component: str) -> Any:
    @sd_mecha.merge_method(register=False)
    def skips_a_component(
        a: Parameter(torch.Tensor),  # type: ignore[valid-type]
        **kwargs: Any,
    ) -> Return(torch.Tensor):  # type: ignore[valid-type]
        if kwargs["key"].startswith(component) and not a.is_meta:
            skip_key(kwargs["key"])
        return a

    return skips_a_component


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("why", ["skipped", "nan"])
@pytest.mark.parametrize("options", [{}, {"checksums": True}, {"shard_size": 20}])
def test_a_component_that_loses_every_tensor_is_not_replaced(
    two: tuple[Path, Path], component: str, why: str, options: dict[str, Any]
) -> None:
    recipe = sd_mecha.n_average(*map(sd_mecha.model, two))
    if why == "skipped":
        recipe = without(component)(recipe)
    else:
        spoil(two[1], component)
    before = {name: (two[0] / name).read_bytes() for name in files(two[0])}
    with pytest.raises(
        OutputError, match=rf"every tensor of component '{component}' was left out.*nothing was written.*omit_component"
    ):
        sd_mecha.merge(recipe, output=two[0], tqdm=None, **options)
    assert {name: (two[0] / name).read_bytes() for name in files(two[0])} == before
    assert {path.name for path in two[0].parent.iterdir()} == {"a", "b"}


def test_a_component_that_loses_some_tensors_is_told_of(
    two: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averaged(*two, output=f"{tmp_path}/whole/")
    assert not caplog.records
    spoil(two[1], "unet", "down_blocks.1.a.weight")
    averaged(*two, output=f"{tmp_path}/out/")
    (told,) = [r.getMessage() for r in caplog.records if "out' lacks" in r.getMessage()]
    assert "lacks 1 tensors that were left out while merging, such as 'unet.down_blocks.1.a.weight'" in told
    assert "random" in told


@pytest.fixture
def partly_copied(two: tuple[Path, Path], tmp_path: Path) -> Path:
    """A pipeline whose UNet, listed first, was copied from the output of an earlier merge."""
    averaged(*two, output=f"{tmp_path}/earlier/", checksums=True, output_dtype="float32")
    shutil.rmtree(two[1] / "unet")
    averaged(*two, output=f"{tmp_path}/out/", side_files=tmp_path / "earlier", checksums=True)
    return tmp_path / "out"


def test_a_pipeline_with_copied_components_carries_the_recipe_of_the_others(partly_copied: Path) -> None:
    report = sd_mecha.verify(partly_copied, against="embedded", sample=None)
    assert report.ok, report
    assert report.compared == 1
    assert "the checksums of 1 tensor agree" in report.notes
    assert "copied, so that no checksum or recipe tells of it: unet (4 tensors)" in report.notes
    changed = partly_copied / "text_encoder" / "model.safetensors"
    raw = changed.read_bytes()
    changed.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    problems = sd_mecha.verify(partly_copied, against="embedded", sample=None).problems
    assert ["'text_encoder.text_model.weight' is not what" in problem for problem in problems] == [True, True]


def test_what_an_earlier_merge_made_is_not_said_of_the_next(partly_copied: Path, tmp_path: Path) -> None:
    averaged(partly_copied, output=f"{tmp_path}/next/", checksums=True)
    first, second = ((folder / "model_index.json").read_text() for folder in (partly_copied, tmp_path / "next"))
    assert second == first.replace('"text_encoder"\n', '"text_encoder unet"\n')
    assert list(json.loads(second).items())[:-1] == list(INDEX.items())
    report = sd_mecha.verify(tmp_path / "next", against="embedded", sample=None)
    assert report.ok, report
    assert report.compared == 5


def test_a_merged_component_without_files_is_found(two: tuple[Path, Path], tmp_path: Path) -> None:
    averaged(*two, output=f"{tmp_path}/out/")
    assert sd_mecha.verify(tmp_path / "out", against="embedded").ok
    shutil.rmtree(tmp_path / "out" / "unet")
    report = sd_mecha.verify(tmp_path / "out")
    assert report.problems == ["it has no weights of 1 component that a merge made, such as 'unet'"]
    assert report.tensors == 1  # the others are checked nevertheless


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        ("scheduler", "it has no files of 1 component that its model_index.json names, such as 'scheduler'"),
        ("text_encoder", "it has no files of 1 component that its model_index.json names, such as 'text_encoder'"),
        ("unet/config.json", "it has weights, but no config.json, of 1 component, such as 'unet'"),
    ],
)
def test_what_a_pipeline_names_and_lacks_is_found(
    two: tuple[Path, Path], tmp_path: Path, ours: bool, lost: str, problem: str
) -> None:
    folder = two[0]
    if ours:
        folder = tmp_path / "out"
        averaged(*two, output=f"{folder}/")
        if lost == "text_encoder":
            problem = "it has no weights of 1 component that a merge made, such as 'text_encoder'"
    assert sd_mecha.verify(folder).ok
    if (folder / lost).is_dir():
        shutil.rmtree(folder / lost)
    else:
        (folder / lost).unlink()
    for path in (folder, folder / "model_index.json"):
        assert sd_mecha.verify(path).problems == [problem]


def test_a_pipeline_does_not_replace_a_model_of_another_format(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    averaged(two[0] / "unet", output=f"{out}/")
    before = {name: (out / name).read_bytes() for name in files(out)}
    with pytest.raises(OutputError, match=r"'huggingface' stands there.*'diffusers' does not.*another name.*--format"):
        averaged(*two, output=out)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    for name in files(out) - {"config.json"}:
        (out / name).unlink()
    averaged(*two, output=out)  # without weights it is no model
    assert sd_mecha.verify(out).ok
    averaged(*two, output=out)


def test_the_configuration_of_a_copied_component_stays(two: tuple[Path, Path], tmp_path: Path) -> None:
    text = '{"torch_dtype": "float32", "tie_word_embeddings": false, "quantization_config": {"bits": 8}}'
    (two[0] / "text_encoder" / "config.json").write_text(text)
    save_file({"lm_head.weight": torch.ones(4)}, two[0] / "text_encoder" / "model.safetensors")
    shutil.rmtree(two[1] / "text_encoder")
    averaged(*two, output=f"{tmp_path}/out/", side_files=two[0])
    assert (tmp_path / "out" / "text_encoder" / "config.json").read_text() == text


def test_private_entries_of_the_listing_are_no_components(tmp_path: Path) -> None:
    private = {"_class_name": ["pipeline", "TinyPipeline"], "_sd_mecha_made": 3}
    assert averaged(pipeline(tmp_path / "a", 0.0, **private), output_dtype=None)


def test_keys_of_a_component_that_the_reference_lacks_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    extra = tmp_path / "extra.safetensors"
    save_file({"unet.w": torch.ones(1), "vae.w": torch.ones(1)}, extra)
    with pytest.raises(OutputError, match=r"'vae\.w' belongs to no part"):
        averaged(extra, output=f"{tmp_path}/out/", output_format="diffusers", side_files=two[0])


def test_a_pipeline_needs_one_to_be_made_after(tmp_path: Path) -> None:
    save_file({"unet.w": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="no model of the recipe is a pipeline"):
        averaged(tmp_path / "x.safetensors", output=f"{tmp_path}/out/", output_format="diffusers")


def test_a_pipeline_and_a_file_of_other_keys_do_not_mix(two: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.0.bias": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"pipeline of unet, text_encoder.*shares no key"):
        averaged(two[0], tmp_path / "x.safetensors")


def test_info_lists_the_components(two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["info", "a"])
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["unet", "4", "16"] in rows
    assert ["text_encoder", "1", "4"] in rows


def test_one_component_is_a_model_of_its_own(two: tuple[Path, Path]) -> None:
    merged = averaged(*(path / "unet" for path in two), output_dtype="float32")
    assert merged["down_blocks.1.a.weight"].tolist() == [5.0] * 4


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"../../etc": ["x", "y"]}, "bad name of a component"),
        ({"a/b": ["x", "y"]}, "bad name of a component"),
        ({"unet": None, "text_encoder": None, "scheduler": 3}, "names no component"),
        ({"unet": [None, None], "text_encoder": [None, None]}, "none of its components has weights"),
    ],
)
def test_a_bad_listing_of_components_is_refused(tmp_path: Path, change: dict[str, Any], rule: str) -> None:
    broken = pipeline(tmp_path / "broken", 0.0, **change)
    with pytest.raises(FileFormatError, match=rule):
        averaged(broken)


@pytest.mark.slow
def test_stable_diffusion_loads_from_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = offline(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        for seed, name in enumerate(("a", "b")):
            stable_diffusion(transformers, diffusers, seed, tmp_path).save_pretrained(
                tmp_path / name, **({"max_shard_size": "20KB"} if name == "a" else {})
            )
        averaged(tmp_path / "a", tmp_path / "b", output=f"{tmp_path}/out/", shard_size="30KB", output_dtype="float32")
        a, b, out = (diffusers.DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("a", "b", "out"))
    assert type(out) is type(a)
    for name in ("unet", "vae", "text_encoder"):
        first, second, merged = (getattr(found, name).state_dict() for found in (a, b, out))
        assert merged.keys() == first.keys()
        for key, tensor in merged.items():
            expected = (first[key] + second[key]) / 2 if tensor.is_floating_point() else first[key]
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert out.tokenizer("a b")["input_ids"] == a.tokenizer("a b")["input_ids"]
    assert out.scheduler.config == a.scheduler.config
    averaged(tmp_path / "a" / "unet", tmp_path / "b" / "unet", output=f"{tmp_path}/unet/", output_dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(tensor, alone[key]) for key, tensor in out.unet.state_dict().items())


@pytest.mark.slow
def test_stable_diffusion_loads_with_a_copied_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = offline(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        for seed, name in enumerate(("a", "b")):
            stable_diffusion(transformers, diffusers, seed, tmp_path).save_pretrained(tmp_path / name)
        averaged(tmp_path / "a", tmp_path / "b", output=f"{tmp_path}/earlier/", output_dtype="float32")
        for copied in ("unet", "vae"):
            shutil.rmtree(tmp_path / "b" / copied)
        averaged(tmp_path / "a", tmp_path / "b", output=f"{tmp_path}/out/", side_files=tmp_path / "earlier")
        monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
        a, earlier, out = (diffusers.DiffusionPipeline.from_pretrained(tmp_path / n) for n in ("a", "earlier", "out"))
        out.save_pretrained(tmp_path / "again")
    assert "mecha_made" not in caplog.text
    assert "mecha_made" not in (tmp_path / "again" / "model_index.json").read_text()
    assert type(out) is type(a)
    for name in ("unet", "vae"):
        expected = getattr(earlier, name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in getattr(out, name).state_dict().items())
    report = sd_mecha.verify(tmp_path / "out", against="embedded", sample=None)
    assert report.ok, report
    assert report.compared == len([key for key in averaged(tmp_path / "out") if key.startswith("text_encoder.")])
