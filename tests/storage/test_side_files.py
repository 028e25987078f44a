"""What goes along with the weights, and what a config says of an output that the other model had otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.folders.side_files import fitted_config, side_files
from sd_mecha.storage.locations import LocalLocation
from tests.storage.places import Unlisted

HALF = TensorEntry((2, 2), torch.float16)
WIDE = TensorEntry((2, 2), torch.float32)
COUNT = TensorEntry((), torch.int64)
FP8 = TensorEntry((2, 2), torch.float8_e4m3fn)


def fitted(config: Any, entries: dict[str, TensorEntry], before: tuple[str, ...] = ()) -> Any:
    return json.loads(fitted_config(json.dumps(config).encode(), entries, before, "config.json"))


def names(folder: Path) -> set[str]:
    return {name for name, _ in side_files(LocalLocation(folder))}


def put(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")


def test_weights_indexes_caches_and_hidden_files_stay_behind(tmp_path: Path) -> None:
    kept = {"config.json", "tokenizer.model", "merges.txt", "LICENSE", "code.py", "model_index.json", "a/b/c/deep.txt"}
    put(tmp_path, *kept)
    put(
        tmp_path, "model.safetensors", "x.BIN", "y.gguf", "model.safetensors.index.json", ".git/config", ".env",
        "pytorch_model.bin.index.fp16.json", "model.safetensors.index.8-bit.json",
        "__pycache__/x.pyc", "onnx/config.json", "a/b/c/d/too_deep.txt",
    )  # fmt: skip
    assert names(tmp_path) == kept


def test_folders_that_lead_to_themselves_end(tmp_path: Path) -> None:
    put(tmp_path, "config.json")
    (tmp_path / "loop").symlink_to(".", target_is_directory=True)
    assert "config.json" in names(tmp_path)


def warned(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    return record.getMessage()


def test_links_that_lead_out_or_to_folders_stay_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "secret/id", "models/config.json", "models/sub/code.py")
    model = tmp_path / "models"
    links = {"notes.txt": "../secret/id", "docs": "../secret", "sub/up": "..", "own.py": "sub/code.py"}
    for name, goal in links.items():
        (model / name).symlink_to(goal)
    assert names(model) == {"config.json", "sub/code.py", "own.py"}
    assert f"{model}: links to folders, or out of the folder of the model" in warned(caplog)
    assert "do not go along: such as 'docs', 'notes.txt', 'sub/up'" in warned(caplog)


def test_a_component_may_share_files_with_the_others_and_is_no_link_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "pipe/model_index.json", "pipe/vae/config.json", "pipe/unet/x.txt", "secret/id")
    (tmp_path / "pipe" / "unet" / "config.json").symlink_to("../vae/config.json")
    (tmp_path / "pipe" / "docs").symlink_to("../secret")
    assert names(tmp_path / "pipe" / "unet") == {"config.json", "x.txt"}
    assert not caplog.records
    assert names(tmp_path / "pipe" / "docs") == set()
    assert "such as 'id'" in warned(caplog)


@pytest.mark.parametrize("sub", ["", "unet/"])
def test_links_of_a_cache_of_the_hub_lead_to_its_files(
    tmp_path: Path, sub: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "models--a/blobs/1", "models--b/blobs/2", "models--a/refs/main", f"models--a/snapshots/rev/{sub}x")
    folder = tmp_path / "models--a" / "snapshots" / "rev"
    links = {"config.json": "models--a/blobs/1", "b": "models--b/blobs/2", "r": "models--a/refs/main"}
    for name, goal in links.items():
        (folder / sub / name).symlink_to(tmp_path / goal)
    (tmp_path / "link").symlink_to(folder / sub)
    for model in (folder / sub, tmp_path / "link"):
        caplog.clear()
        assert names(model) == {"x", "config.json", "b"}
        assert "such as 'r'" in warned(caplog)


def test_files_of_a_cache_are_found_from_anywhere_and_wherever_they_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "disk/0a1b", "disk/id_rsa", "models--b/blobs/2c", "models--b/blobs/id", "blobs/3d", "mine/x")
    snapshot = tmp_path / "models--a" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a" / "blobs").symlink_to("../disk")
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    (snapshot / "notes.txt").symlink_to("../../blobs/id_rsa")
    assert names(snapshot) == {"config.json"}
    assert "such as 'notes.txt'" in warned(caplog)
    caplog.clear()
    links = {"config.json": "models--b/blobs/2c", "id": "models--b/blobs/id", "other": "blobs/3d"}
    for name, goal in links.items():
        (tmp_path / "mine" / name).symlink_to(tmp_path / goal)
    assert names(tmp_path / "mine") == {"x", "config.json"}
    assert "such as 'id', 'other'" in warned(caplog)


def test_a_component_that_its_pipeline_names_may_be_a_link(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "shared/config.json", "shared/vocab.txt", "shared/.env", "shared/deep/x", "secret/id", "secret/notes")
    (tmp_path / "shared" / "out.txt").symlink_to("../secret/id")
    (tmp_path / "pipe").mkdir()
    listing = {"text": ["transformers", "T5"], "docs": ["transformers", "T5"], "off": [None, None]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(listing))
    for name, goal in {"text": "shared", "docs": "secret", "off": "shared", "unnamed": "shared"}.items():
        (tmp_path / "pipe" / name).symlink_to(f"../{goal}")
    assert names(tmp_path / "pipe" / "text") == {"config.json", "vocab.txt"}
    assert "such as 'deep/x', 'out.txt'" in warned(caplog)
    for name in ("docs", "off", "unnamed"):
        assert names(tmp_path / "pipe" / name) == set()


def test_where_nothing_can_be_listed_the_usual_names_are_tried(tmp_path: Path) -> None:
    put(tmp_path, "config.json", "tokenizer.json", "model_index.json", "unusual.txt")
    found = dict(side_files(Unlisted(tmp_path)))
    assert found.keys() == {"config.json", "tokenizer.json", "model_index.json"}


@pytest.mark.parametrize(
    ("config", "entries", "expected"),
    [
        ({"dtype": "float32"}, {"w": HALF, "n": COUNT}, {"dtype": "float16"}),
        ({"torch_dtype": "float32", "sub": {"dtype": "bfloat16"}}, {"w": HALF},
         {"torch_dtype": "float16", "sub": {"dtype": "float16"}}),
        ({"dtype": "float32"}, {"w": HALF, "v": WIDE}, {"dtype": "float32"}),
        ({"dtype": "auto", "x": [1]}, {"w": HALF}, {"dtype": "auto", "x": [1]}),
        ({"x": 1}, {"w": HALF}, {"x": 1}),
        ({"quantization_config": {"dtype": "float8"}}, {"w": HALF}, {}),
        ({"quantization_config": {"dtype": "float32"}}, {"w": FP8, "v": HALF},
         {"quantization_config": {"dtype": "float32"}}),
    ],
)  # fmt: skip
def test_what_a_config_says_of_dtypes(config: Any, entries: dict[str, TensorEntry], expected: Any) -> None:
    assert fitted(config, entries) == expected


@pytest.mark.parametrize(
    ("head", "before", "expected"),
    [(True, False, False), (False, True, True), (True, True, None), (False, False, None)],
)
def test_a_shared_head_is_told(head: bool, before: bool, expected: bool | None) -> None:
    entries = {"embed.weight": HALF} | ({"lm_head.weight": HALF} if head else {})
    had = ("embed.weight", "lm_head.weight") if before else ("embed.weight",)
    config = {"text_config": {"tie_word_embeddings": "as it was"}}
    found = fitted(config, entries, had)
    told = {} if expected is None else {"tie_word_embeddings": expected}
    inner = "as it was" if expected is None else expected
    assert found == {"text_config": {"tie_word_embeddings": inner}, **told}


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{nonsense", b"\xff", b"[" * 10_000])
def test_what_is_no_config_stays_as_it_is(raw: bytes) -> None:
    assert fitted_config(raw, {"w": HALF}, (), "config.json") == raw


def test_what_is_too_large_for_a_config_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = b'{"dtype": "float32", "a": [' + b"[]," * 2_000_000 + b"0]}"
    monkeypatch.setattr(json, "loads", pytest.fail)
    assert fitted_config(raw, {"w": HALF}, (), "config.json") == raw


def test_half_a_surrogate_pair_in_a_config_survives() -> None:
    found = fitted_config(b'{"dtype": "float32", "a": "\\ud800\xc3\xa9"}', {"w": HALF}, (), "config.json")
    assert found.decode() == '{\n  "dtype": "float16",\n  "a": "\\ud800é"\n}\n'


def test_an_unchanged_config_keeps_its_text() -> None:
    raw = b'{ "dtype":"float16",\n\n "eps": 1e-06, "limit": Infinity }'
    assert fitted_config(raw, {"w": HALF}, (), "config.json") == raw
