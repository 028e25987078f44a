"""PyTorch checkpoints as inputs: merged like the same tensors in safetensors files, whatever their names end in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_mecha
from sd_mecha.errors import FileFormatError, MechaError, UnknownFormatError
from sd_mecha.extensions import model_formats
from tests.storage.torch_files import archive, saved, write

KINDS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def model(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 30, generator=generator)
    return {
        "block.0.weight": weight,
        "block.0.bias": torch.randn(40, generator=generator).half(),
        "block.1.weight": torch.randn(30, 40, generator=generator).t(),
        "head.weight": weight,  # tied
        "part": torch.randn(9, 9, generator=generator)[1::2, ::3].bfloat16(),
    }


def merged(*paths: Path, output: Path, **options: Any) -> bytes:
    recipe = sd_mecha.weighted_sum(*(sd_mecha.model(path) for path in paths), alpha=0.3)
    sd_mecha.merge(recipe, output=output, tqdm=None, **options)
    return output.read_bytes()


def data_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def tensors_of(recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
    found = sd_mecha.merge(recipe, tqdm=None, **options)
    return {name: tensor for name, tensor in found.items() if name != "__metadata__"}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=0)


@KINDS
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ""])
@pytest.mark.parametrize("budget", ["4KB", None])
def test_a_merge_equals_that_of_safetensors(tmp_path: Path, new: bool, suffix: str, budget: str | None) -> None:
    for index, name in enumerate("ab"):
        tensors = model(index)
        write(tmp_path / f"{name}-torch{suffix}", {"state_dict": tensors, "global_step": 7}, new)
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, tmp_path / f"{name}-plain.safetensors")
    options = {} if budget is None else {"total_buffer_size": 4096}
    for kind, end in (("torch", suffix), ("plain", ".safetensors")):
        paths = [tmp_path / f"{name}-{kind}{end}" for name in "ab"]
        merged(*paths, output=tmp_path / f"{kind}-out.safetensors", **options)
    assert_same(data_of(tmp_path / "torch-out.safetensors"), data_of(tmp_path / "plain-out.safetensors"))


@pytest.mark.parametrize("threads", [1, 8])
def test_kinds_of_files_can_be_mixed(tmp_path: Path, threads: int) -> None:
    write(tmp_path / "a.ckpt", model(1), True)
    write(tmp_path / "b.pt", model(2), False)
    mixed = sd_mecha.n_average(
        sd_mecha.model(tmp_path / "a.ckpt"), sd_mecha.model(tmp_path / "b.pt"), sd_mecha.model(model(3))
    )
    plain = sd_mecha.n_average(*(sd_mecha.model(model(seed)) for seed in (1, 2, 3)))
    assert_same(tensors_of(mixed, threads=threads), tensors_of(plain))


def test_a_lightning_checkpoint_gives_its_state_dict_with_the_keys_of_the_file(tmp_path: Path) -> None:
    weights = {"model.w": torch.ones(2).half(), "model_ema.w": torch.zeros(2).half()}
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "callbacks": {"EMA": {"ema_weights": [torch.zeros(2)]}},
    }
    path = write(tmp_path / "last.ckpt", content)
    assert_same(tensors_of(sd_mecha.model(path)), weights)


def test_other_zip_archives_and_pickles_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    for content, says in ((archive({"a.npy": b"x"}), "zip archive"), (b"\x80\x04}.", "torch.save did not write")):
        path.write_bytes(content)
        with pytest.raises(UnknownFormatError, match=says):
            sd_mecha.merge(sd_mecha.model(path))


def test_the_tar_archives_of_the_first_releases_are_named(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    path.write_bytes(b"sys_info".ljust(100, b"\0") + b"0000644\0" + bytes(404))
    with pytest.raises(UnknownFormatError, match=r"a tar archive as PyTorch before 0\.2"):
        sd_mecha.merge(sd_mecha.model(path))


@KINDS
def test_a_damaged_file_is_still_recognised(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved(model(1), new)[:-100])
    with pytest.raises(FileFormatError, match="fetch it again"):
        sd_mecha.merge(sd_mecha.model(path))


def test_what_is_saved_beside_no_dict_is_told_in_words(tmp_path: Path) -> None:
    path = write(tmp_path / "list.pt", [torch.ones(2), torch.ones(2)])
    with pytest.raises(FileFormatError, match=r"holds \[<tensor>, <tensor>\]; expected a dict of tensors"):
        sd_mecha.merge(sd_mecha.model(path))


@KINDS
@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_refused_as_such(tmp_path: Path, new: bool) -> None:
    scales = torch.ones(2), torch.zeros(2)
    for weight in (
        torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
        torch.quantize_per_channel(torch.ones(2, 3), *scales, 0, torch.qint8),
    ):
        path = write(tmp_path / "quantized.pt", {"w": weight}, new)
        with pytest.raises(FileFormatError, match="tensor 'w': it is quantized"):
            sd_mecha.merge(sd_mecha.model(path))


def test_the_format_only_reads(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="cannot write"):
        model_formats.resolve("pytorch").writer(tmp_path / "x.pt")
    a = write(tmp_path / "a.pt", model(1))
    with pytest.raises(MechaError, match="cannot write"):
        sd_mecha.merge(sd_mecha.model(a), output=tmp_path / "out.pt", output_format="pytorch", tqdm=None)
    assert not (tmp_path / "out.pt").exists()
