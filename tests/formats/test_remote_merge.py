"""Merging models that lie at addresses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save

import sd_mecha
from sd_mecha.errors import ChangedInputError, FileFormatError, ModelAccessError, UnknownFormatError
from sd_mecha.storage.locations import locate
from sd_mecha.storage.remote import file as remote_file
from tests.formats.web_server import Site, serving
from tests.memory import least, needs_proc, printed


def content(seed: int, keys: int = 20, size: int = 50_000) -> bytes:
    chance = torch.Generator().manual_seed(seed)
    return save({f"layer.{i}.weight": torch.randn(size, generator=chance) for i in range(keys)})


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote_file.PATIENCE, "pause", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site():
    with serving() as site:
        site.files = {"/a.safetensors": content(1), "/b.safetensors": content(2)}
        yield site


def merged(output: Path, a: str | Path, b: str | Path, **options: object) -> bytes:
    recipe = sd_mecha.weighted_sum(sd_mecha.model(str(a)), sd_mecha.model(str(b)), alpha=0.3)
    sd_mecha.merge(recipe, output=output, **options)
    header = output.read_bytes()
    return header[8 + int.from_bytes(header[:8], "little") :]


@pytest.fixture
def expected(site: Site, tmp_path: Path) -> bytes:
    for name, data in site.files.items():
        (tmp_path / name[1:]).write_bytes(data)
    return merged(tmp_path / "local.safetensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_two_remote_files_merge_as_local_ones_do(site, expected, tmp_path):
    output = tmp_path / "out.safetensors"
    for threads in (1, 4):
        assert merged(output, site.url("/a.safetensors"), site.url("/b.safetensors"), threads=threads) == expected
    assert merged(output, site.url("/a.safetensors?download=true"), tmp_path / "b.safetensors") == expected


def test_no_byte_is_fetched_twice(site, tmp_path):
    merged(tmp_path / "out.safetensors", site.url("/a.safetensors"), site.url("/b.safetensors"))
    total = sum(map(len, site.files.values()))
    assert total * 0.9 < site.served < total * 1.1


def test_only_header_and_needed_ranges_are_fetched(site):
    site.files["/big.safetensors"] = content(3, keys=100, size=100_000)  # 40 MB
    reader = sd_mecha.extensions.model_formats.open_model(locate(site.url("/big.safetensors")))
    data = bytearray(400_000)
    for key in ("layer.40.weight", "layer.80.weight"):
        reader.read_into(key, 0, memoryview(data))
    reader.close()
    assert site.served < 32 * 2**10 + 2 * (400_000 + 2 * 2**20)


def test_connections_that_break_do_not_change_the_result(site, expected, tmp_path):
    site.faults.extend(["ok"] * 3 + ["drop", "short", "500", "ok", "close", "503"])
    assert merged(tmp_path / "out.safetensors", site.url("/a.safetensors"), site.url("/b.safetensors")) == expected
    assert not site.faults


def test_a_dead_server_fails_the_merge_and_leaves_nothing(site, tmp_path):
    site.faults.extend(["ok"] * 4 + ["500"] * 1000)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(ModelAccessError, match=r"safetensors: cannot be read at byte \d+: the server answered 500"):
        merged(folder / "out.safetensors", site.url("/a.safetensors"), site.url("/b.safetensors"))
    assert list(folder.iterdir()) == []


def test_content_that_changes_meanwhile_fails_the_merge(site, tmp_path, monkeypatch):
    """The other file comes while the first one is being read: after the third range."""
    fetch = remote_file._Content.fetch
    count = 0

    def changing(self, *args):
        nonlocal count
        count += 1
        if count == 4:
            site.files["/a.safetensors"] = content(9)
        return fetch(self, *args)

    monkeypatch.setattr(remote_file._Content, "fetch", changing)
    with pytest.raises(ChangedInputError, match=r"a\.safetensors: changed while it was in use \(ETag was"):
        merged(tmp_path / "out.safetensors", site.url("/a.safetensors"), site.url("/b.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_resumed_from_a_server_that_does_not_tell_contents_apart(site, tmp_path, caplog):
    """Neither ETag nor time: the content may have become another one of the same size."""
    output, address = tmp_path / "out.safetensors", site.url("/a.safetensors")
    site.etags = False
    site.faults.extend(["ok"] * 4 + ["500"] * 1000)
    with pytest.raises(ModelAccessError):
        merged(output, address, site.url("/b.safetensors"), resume=True, threads=0)
    site.faults.clear()
    site.files["/a.safetensors"] = content(9)
    resumed = merged(output, address, site.url("/b.safetensors"), resume=True)
    assert "a.safetensors does not tell whether it changed: this merge starts afresh" in caplog.text
    assert resumed == merged(tmp_path / "fresh.safetensors", address, site.url("/b.safetensors"))


def test_a_login_page_instead_of_a_model(site, tmp_path):
    site.ranges = False
    site.files["/a"] = b"<!doctype html><title>Sign in</title>"
    site.files["/a.safetensors"] = site.files["/a"]
    for path, error in (("/a", UnknownFormatError), ("/a.safetensors", FileFormatError)):
        with pytest.raises(error, match="a web page"):
            sd_mecha.merge(sd_mecha.model(site.url(path)), output=tmp_path / "out.safetensors")


def test_any_filesystem_of_fsspec(site, expected, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/models{name}": data for name, data in site.files.items()})
    try:
        output = tmp_path / "out.safetensors"
        assert merged(output, "memory://models/a.safetensors", site.url("/b.safetensors")) == expected
    finally:
        memory.rm("/models", recursive=True)


@pytest.fixture(scope="module")
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class TestS3:
    @pytest.fixture
    def bucket(self, s3_server, monkeypatch):
        for name, value in {
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": s3_server,
        }.items():
            monkeypatch.setenv(name, value)
        system = fsspec.filesystem("s3", use_listings_cache=False)
        if not system.exists("models"):
            system.mkdir("models")
        return system

    def test_merges_as_local_files_do(self, bucket, site, expected, tmp_path):
        bucket.pipe({f"models{name}": data for name, data in site.files.items()})
        output = tmp_path / "out.safetensors"
        assert merged(output, "s3://models/a.safetensors", "s3://models/b.safetensors") == expected

    def test_folders_and_missing_files(self, bucket):
        bucket.pipe({"models/x/one.bin": b"1", "models/x/y/two.bin": b"2"})
        folder = locate("s3://models/x")
        assert folder.is_folder()
        assert not folder.is_file()
        assert folder.children() == ["one.bin", "y"]
        assert folder.child("y/two.bin").read(10) == b"2"
        assert not folder.child("none.bin").is_file()

    def test_changed_content_is_noticed(self, bucket):
        bucket.pipe("models/c.bin", bytes(200_000))
        file = locate("s3://models/c.bin").open()
        file.check_unchanged()
        assert file.read(150_000, 10) == bytes(10)
        file.close()
        file = locate("s3://models/c.bin").open()
        bucket.pipe("models/c.bin", b"1" * 200_000)
        for ask in (lambda: file.read(150_000, 10), file.check_unchanged):
            with pytest.raises(ChangedInputError, match=r"s3://models/c\.bin: changed while it was in use"):
                ask()
        file.close()


PROGRAM = """
import sys, torch
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024
before = peak()
import sd_mecha
a, b, output = sys.argv[1:]
sd_mecha.merge(sd_mecha.weighted_sum(sd_mecha.model(a), sd_mecha.model(b), alpha=0.3), output=output, threads=2)
print(peak() - before)
"""


@pytest.mark.slow
@needs_proc
def test_memory_does_not_grow_with_the_files(site, tmp_path):
    for name, seed in (("/a.safetensors", 1), ("/b.safetensors", 2)):
        site.files[name] = content(seed, keys=60, size=1_000_000)  # 240 MB
    addresses = [site.url(name) for name in ("/a.safetensors", "/b.safetensors")]
    assert least(lambda: printed(PROGRAM, *addresses, str(tmp_path / "out.safetensors")), 128) <= 128


@pytest.mark.slow
def test_a_program_that_stops_in_the_middle_ends_at_once(site):
    """Threads that wait for a server that says nothing must not keep the interpreter."""
    program = """
import sys, time
from sd_mecha.storage.locations import locate
file = locate(sys.argv[1]).open()
for offset in range(0, 3_000_000, 250_000):
    file.read(offset, 250_000)
print("read", flush=True)
"""
    site.files["/big.bin"] = bytes(8_000_000)
    process = subprocess.Popen(
        [sys.executable, "-c", program, site.url("/big.bin")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (0, "read", "")


def test_an_index_names_its_files_beside_itself(site):
    site.files["/repo/model.safetensors.index.json"] = json.dumps({"weight_map": {}}).encode()
    site.files["/repo/model-1.safetensors"] = site.files["/a.safetensors"]
    index = locate(site.url("/repo/model.safetensors.index.json?download=true"))
    shard = index.parent().child("model-1.safetensors")
    reader = sd_mecha.extensions.model_formats.open_model(shard)
    assert len(reader.entries) == 20
    reader.close()


@pytest.mark.parametrize("named", ["/repo", "/repo/", "/repo/config.json"])
def test_side_files_may_lie_on_the_web(site, tmp_path, named):
    site.files["/repo/config.json"] = b'{"architectures": ["Tiny"]}'
    recipe = sd_mecha.model(site.url("/a.safetensors"))
    sd_mecha.merge(recipe, output=tmp_path / "out", output_format="huggingface", side_files=site.url(named))
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["architectures"] == ["Tiny"]


def test_what_grants_access_is_not_published(site, tmp_path, caplog):
    output = tmp_path / "out.safetensors"
    address = site.url("/a.safetensors?X-Amz-Signature=s3cret&download=true")
    merged(output, address, site.url("/b.safetensors").replace("//", "//me:s3cret@"), checksums=True)
    head = output.read_bytes()
    head = head[: 8 + int.from_bytes(head[:8], "little")]
    assert b"s3cret" not in head
    assert b"a.safetensors?download=true" in head
    site.statuses["/a.safetensors"] = 403
    with pytest.raises(ModelAccessError) as caught:
        merged(output, address, address)
    assert "s3cret" not in str(caught.value) + repr(sd_mecha.model(address)) + caplog.text
