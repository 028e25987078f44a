"""Merging models from a Hugging Face hub, which is asked by its own library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import sd_mecha
from sd_mecha.errors import ChangedInputError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.locations import locate
from sd_mecha.storage.remote import file as remote_file
from tests.formats.hub_server import SIGNATURE, Files, Hub, commit, hub_serving

ONE = "hf://me/one/a.safetensors"
TWO = "hf://me/two/a.safetensors"


def tensors(seed: int, keys: int = 20, size: int = 50_000) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(size, generator=chance) for i in range(keys)}


def single(seed: int, **shape: int) -> Files:
    return {"a.safetensors": save(tensors(seed, **shape)), "README.md": b"# a model"}


def sharded(seed: int, count: int = 3) -> Files:
    content, files, index = tensors(seed), {"config.json": b"{}"}, {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: content[key] for key in list(content)[number::count]}
        files[name] = save(part)
        index |= dict.fromkeys(part, name)
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(remote_file.PATIENCE, "pause", 0.001)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with hub_serving() as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.address})
        hub.repos = {"me/one": {"main": single(1)}, "me/two": {"main": single(2), "v1": single(3)}}
        yield hub


def merged(output: Path, a: str | Path, b: str | Path, **options: object) -> bytes:
    recipe = sd_mecha.weighted_sum(sd_mecha.model(str(a)), sd_mecha.model(str(b)), alpha=0.3)
    sd_mecha.merge(recipe, output=output, **options)
    data = output.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def local(folder: Path, *models: Files) -> bytes:
    """What the same files give when they are on this computer."""
    paths = []
    for number, files in enumerate(models):
        paths.append(folder / f"local-{number}")
        paths[-1].mkdir()
        for name, data in files.items():
            (paths[-1] / name).write_bytes(data)
    paths = [path / "a.safetensors" if (path / "a.safetensors").exists() else path for path in paths]
    return merged(folder / "local.safetensors", *paths)


@pytest.mark.parametrize("threads", [1, 4])
def test_files_merge_as_local_ones_do(hub: Hub, tmp_path: Path, threads: int) -> None:
    assert merged(tmp_path / "out.safetensors", ONE, TWO, threads=threads) == local(tmp_path, single(1), single(2))


def test_folders_merge_as_local_files_do(hub: Hub, tmp_path: Path) -> None:
    hub.repos["me/shards"] = {"main": sharded(1), "with/slash": sharded(2)}
    hub.repos["me/below"] = {"main": {f"inner/folder/{name}": data for name, data in sharded(2).items()}}
    expected, output = local(tmp_path, sharded(1), sharded(2)), tmp_path / "out.safetensors"
    assert merged(output, "hf://me/shards", "hf://me/shards@with%2Fslash") == expected
    assert merged(output, "hf://me/shards/model.safetensors.index.json", "hf://me/below/inner/folder") == expected


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, tmp_path: Path) -> None:
    expected, output = local(tmp_path, single(1), single(3)), tmp_path / "out.safetensors"
    for revision in ("v1", commit(hub.repos["me/two"]["v1"])):
        assert merged(output, ONE, f"hf://me/two@{revision}/a.safetensors") == expected
    hub.repos["me/two"]["refs/pr/7"] = single(3)
    for revision in ("refs/pr/7", "refs%2Fpr%2F7"):
        assert merged(output, ONE, f"hf://me/two@{revision}/a.safetensors") == expected


def test_data_sets_and_spaces(hub: Hub, tmp_path: Path) -> None:
    hub.repos |= {"datasets/me/data": {"main": sharded(1)}, "spaces/me/space": {"v1": single(2)}}
    output = tmp_path / "out.safetensors"
    expected = local(tmp_path, sharded(1), single(2))
    assert merged(output, "hf://datasets/me/data", "hf://spaces/me/space@v1/a.safetensors") == expected


def test_a_folder_is_listed_once_and_not_for_each_shard(hub: Hub, tmp_path: Path) -> None:
    hub.repos["me/shards"] = {"main": sharded(1, count=10)}
    hub.repos["me/below"] = {"main": {f"inner/{name}": data for name, data in sharded(2, count=10).items()}}
    locate("hf://me/shards").parent().child("other")
    assert not hub.requests
    merged(tmp_path / "out.safetensors", "hf://me/shards", "hf://me/below/inner")
    paths = [path.partition("?")[0] for _, path, _, _ in hub.requests]
    for repo in ("me/shards", "me/below"):
        assert sum(path.startswith(f"/api/models/{repo}/tree/") for path in paths) <= 3
        assert sum(path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main") for path in paths) <= 3


def test_only_headers_and_needed_ranges_are_fetched(hub: Hub) -> None:
    hub.repos["me/big"] = {"main": single(4, keys=100, size=100_000)}  # 40 MB
    reader = sd_mecha.extensions.model_formats.open_model(locate("hf://me/big/a.safetensors"))
    data = bytearray(400_000)
    for key in ("layer.40.weight", "layer.80.weight"):
        reader.read_into(key, 0, memoryview(data))
    reader.close()
    assert hub.storage.served < 32 * 2**10 + 2 * (400_000 + 2 * 2**20)
    assert all(ranged for _, ranged in hub.storage.requests)


def test_no_byte_is_fetched_twice(hub: Hub, tmp_path: Path) -> None:
    merged(tmp_path / "out.safetensors", ONE, TWO)
    total = sum(len(hub.repos[repo]["main"]["a.safetensors"]) for repo in ("me/one", "me/two"))
    assert total * 0.9 < hub.storage.served < total * 1.1


def test_a_server_that_sends_whole_files_only_is_refused(hub: Hub, tmp_path: Path) -> None:
    """What comes would otherwise be taken for the range that was asked for."""
    hub.storage.ranges = False
    with pytest.raises(ModelAccessError, match="sends whole files only; download the file and name the copy"):
        merged(tmp_path / "out.safetensors", ONE, ONE)


def test_connections_that_break_do_not_change_the_result(hub: Hub, tmp_path: Path) -> None:
    hub.faults.extend(["close", "close"])
    hub.storage.faults.extend(["ok", "ok", "ok", "drop", "short"])
    assert merged(tmp_path / "out.safetensors", ONE, TWO) == local(tmp_path, single(1), single(2))
    assert not hub.faults
    assert not hub.storage.faults


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/none/a.safetensors", "repository not found.*check the address; if it is private, log in with `hf"),
        ("hf://me/none", "repository not found.*check the address; if it is private, log in with `hf"),
        ("hf://me/private/a.safetensors", "repository not found.*check the address; if it is private, log in with `hf"),
        ("hf://me/one/b.safetensors", r"was not found \(FileNotFoundError: me/one/b\.safetensors\); check the address"),
        ("hf://me/one@v9/a.safetensors", "revision not found.*check the address"),
    ],
)
def test_what_is_not_there(hub: Hub, tmp_path: Path, address: str, message: str) -> None:
    hub.repos["me/private"] = {"main": single(1)}
    hub.private.add("me/private")
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        merged(tmp_path / "out.safetensors", address, TWO)
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_was_missing_is_found_once_it_is_there(hub: Hub, tmp_path: Path) -> None:
    """The library remembers listings, and what is not there, for as long as the program runs."""
    output = tmp_path / "out.safetensors"
    for there in ({}, {"config.json": b"{}"}):
        hub.repos |= {"me/late": {"main": there}} if there else {}
        with pytest.raises(MechaError):
            merged(output, "hf://me/late", TWO)
    assert locate("hf://me/late").children() == ["config.json"]
    hub.repos["me/late"]["main"] = sharded(1)
    assert len(locate("hf://me/late").children()) == 5
    assert merged(output, "hf://me/late", TWO) == local(tmp_path, sharded(1), single(2))


@pytest.mark.parametrize("token", ["", "hf_wrong"])
@pytest.mark.parametrize(
    ("files", "address"), [(single(1), "hf://me/gated/a.safetensors"), (sharded(1), "hf://me/gated")]
)
def test_a_gated_repository(hub: Hub, tmp_path, monkeypatch, caplog, capfd, files: Files, address, token) -> None:
    hub.repos["me/gated"] = {"main": files}
    hub.gated.add("me/gated")
    output = tmp_path / "out.safetensors"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelAccessError, match=r"wants a login.*accept its terms on the hub.*HF_TOKEN") as caught:
        merged(output, address, address)
    assert "tried" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert merged(output, address, TWO) == local(tmp_path, files, single(2))
    logins = {login for _, _, _, login in hub.requests}
    assert logins <= {"", f"Bearer {token}", f"Bearer {hub.token}"}
    assert f"Bearer {hub.token}" in logins
    assert "Authorization" not in hub.storage.headers
    said = str(caught.value) + caplog.text + "".join(capfd.readouterr()) + repr(sd_mecha.model(address))
    assert "hf_" not in said.replace("hf_hub", "")
    assert hub.token.encode() not in output.read_bytes()


def test_signatures_of_the_storage_are_not_shown(hub: Hub, tmp_path: Path) -> None:
    merged(tmp_path / "out.safetensors", ONE, TWO)
    hub.storage.statuses = dict.fromkeys(hub.storage.files, 403)
    with pytest.raises(ModelAccessError, match="may not be read") as caught:
        merged(tmp_path / "out.safetensors", ONE, TWO)
    assert SIGNATURE.partition("=")[2] not in str(caught.value)


@pytest.fixture
def meanwhile(monkeypatch):
    """Lets something happen while a merge reads."""

    def arrange(happens: Callable[[], object]) -> None:
        fetch, count = remote_file._Content.fetch, 0

        def counting(self, *args):
            nonlocal count
            count += 1
            if count == 4:
                happens()
            return fetch(self, *args)

        monkeypatch.setattr(remote_file._Content, "fetch", counting)

    return arrange


@pytest.mark.parametrize("now", [single(9), single(9, keys=1), {"README.md": b""}])
def test_a_repository_that_goes_on_meanwhile_is_read_as_it_was(hub: Hub, tmp_path: Path, meanwhile, now: Files) -> None:
    output, expected = tmp_path / "out.safetensors", local(tmp_path, single(1), single(2))
    meanwhile(lambda: hub.repos["me/one"].update(main=now))
    assert merged(output, ONE, TWO) == expected
    hub.repos["me/one"]["main"] = single(3)
    assert merged(output, ONE, TWO) != expected


def test_a_folder_is_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    hub.repos["me/shards"] = {"main": sharded(1)}
    folder = locate("hf://me/shards/model.safetensors.index.json").parent()
    assert folder.is_folder()
    hub.repos["me/shards"]["main"] = {"model-00001-of-00003.safetensors": b"new"}
    shard = folder.child("model-00001-of-00003.safetensors")
    file = shard.open()
    assert file.read(0, file.size) == sharded(1)["model-00001-of-00003.safetensors"]
    file.close()
    assert len(shard.parent().children()) == 5
    assert locate("hf://me/shards").children() == ["model-00001-of-00003.safetensors"]


def test_what_tells_a_file_from_another_is_its_content(hub: Hub) -> None:
    """A merge that goes on compares it; other files of the repository do not matter."""

    def fingerprint() -> str:
        file = locate(ONE).open()
        file.close()
        return file.fingerprint

    before = fingerprint()
    hub.repos["me/one"]["main"] = single(1) | {"README.md": b"# a better model"}
    assert fingerprint() == before
    hub.repos["me/one"]["main"] = single(9)
    assert fingerprint() != before


@pytest.mark.parametrize("repo", ["me/one", "me/two"])
def test_content_that_is_deleted_for_good_meanwhile_fails_the_merge(hub: Hub, tmp_path, meanwhile, repo: str) -> None:
    def delete() -> None:
        hub.repos[repo]["main"] = {"README.md": b""}
        hub.history[repo].clear()

    meanwhile(delete)
    with pytest.raises(ChangedInputError, match=rf"hf://{repo}/a\.safetensors: vanished while it was in use"):
        merged(tmp_path / "out.safetensors", ONE, TWO)
    assert not (tmp_path / "out.safetensors").exists()


def command(hub: Hub, folder: Path, a: str, b: str) -> subprocess.CompletedProcess[str]:
    """A merge as a user starts it, with a Hugging Face folder of its own."""
    recipe = sd_mecha.serialize(sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=0.3), finalize=False)
    (folder / "recipe.mecha").write_text(recipe)
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_TOKEN": hub.token, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from sd_mecha.cli import main; main()",
            "merge",
            "recipe.mecha",
            "-o",
            "out.safetensors",
        ],
        env={**os.environ, **own},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_program_downloads_nothing_and_fails_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.private.add("me/one")
    done = command(hub, tmp_path, ONE, TWO)
    assert done.returncode == 0, done.stderr
    data = (tmp_path / "out.safetensors").read_bytes()
    assert data.endswith(local(tmp_path, single(1), single(2)))
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    done = command(hub, tmp_path, "hf://me/none/a.safetensors", TWO)
    assert done.returncode == 1
    assert "hf://me/none/a.safetensors" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert hub.token not in done.stdout + done.stderr
