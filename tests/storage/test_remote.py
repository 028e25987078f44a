from __future__ import annotations

import threading
import time

import pytest

from sd_mecha.errors import ChangedInputError, FileFormatError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.foreign import describe_foreign
from sd_mecha.storage.locations import locate
from sd_mecha.storage.remote import file as remote_file
from sd_mecha.storage.remote import web_client
from sd_mecha.storage.remote.block_cache import BlockCache
from sd_mecha.storage.remote.file import RemoteFile
from sd_mecha.storage.remote.web import WebPlace
from tests.formats.web_server import Site, serving
from tests.storage.forking import forks, in_child

CONTENT = bytes(i * 7 % 251 for i in range(300_000))
PATH = "/models/a.bin"


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(remote_file.PATIENCE, "pause", 0.001)
    monkeypatch.setattr(remote_file.PATIENCE, "attempts", 3)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as site:
        site.files[PATH] = CONTENT
        yield site


@pytest.fixture
def opened(site):
    cache = BlockCache(2**20, block=2**12, longest=2**16, ahead=0)
    file = RemoteFile(WebPlace(site.url(PATH)), cache=cache)
    yield file
    file.close()


def test_any_range_reads_back(opened):
    for start, stop in [(0, 10), (5, 5), (70_000, 70_001), (65_000, 140_000), (299_990, 300_000), (0, 300_000)]:
        assert opened.read(start, stop - start) == CONTENT[start:stop]
    assert opened.size == len(CONTENT)


def test_what_lies_outside_is_refused(opened):
    with pytest.raises(ValueError, match="outside of 300000"):
        opened.read(299_999, 2)
    opened.close()
    with pytest.raises(ValueError, match=r"read after close\(\)"):
        opened.read(0, 1)


def test_many_threads_read_their_own_ranges(opened):
    wrong = []

    def work(seed: int) -> None:
        for step in range(40):
            offset = (seed * 131_071 + step * 7_919) % 290_000
            if opened.read(offset, 5_000) != CONTENT[offset : offset + 5_000]:
                wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_question_finds_a_file_and_small_files_need_no_other(site):
    site.files["/s.json"] = b'{"a": 1}'
    place = locate(site.url("/s.json"))
    assert place.is_file()
    assert not place.is_folder()
    assert place.head == place.read(100) == b'{"a": 1}'
    assert len(site.requests) == 1
    with pytest.raises(FileFormatError, match="has 8 bytes; expected at most 5"):
        place.read(5)


def test_empty_file(site):
    site.files["/empty"] = b""
    place = locate(site.url("/empty"))
    assert place.is_file()
    assert place.head == b""
    assert place.read(10) == b""


@pytest.mark.parametrize("fault", ["drop", "short", "close", "500", "503", "429"])
def test_a_failure_is_mended_by_another_try(site, opened, fault):
    site.faults.extend([fault, fault])
    assert opened.read(100_000, 20_000) == CONTENT[100_000:120_000]
    assert not site.faults


def test_only_what_is_missing_is_asked_for_again(site, opened):
    site.requests.clear()
    site.served = 0
    site.faults.append("drop")
    opened.read(40_960, 8_192)
    assert site.requests == [(PATH, "bytes=40960-49151"), (PATH, "bytes=45056-49151")]
    assert site.served == 8_192


def test_failures_at_opening_are_mended_too(site):
    site.faults.extend(["500", "close"])
    assert locate(site.url(PATH)).is_file()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "the server answered 500 Internal Server Error"),
        ("close", r"the connection broke \(.*\)"),
    ],
)
def test_tries_are_limited(site, opened, fault, reason):
    site.requests.clear()
    site.faults.extend([fault] * 9)
    with pytest.raises(
        ModelAccessError, match=rf"a\.bin: cannot be read at byte 40960: {reason}; tried 3 times; check"
    ):
        opened.read(40_960, 10)
    assert len(site.requests) <= 4, "a kept connection that is dead does not count"
    site.faults.clear()
    assert opened.read(40_960, 10) == CONTENT[40_960:40_970], "a failure does not stick"


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(site, monkeypatch):
    monkeypatch.setattr(web_client, "TIMEOUT", 0.02)
    monkeypatch.setattr(remote_file.PATIENCE, "attempts", 2)
    site.delay = 0.06
    with pytest.raises(ModelAccessError, match=r"cannot be reached: no answer within 0\.02 seconds; tried 2 times"):
        locate(site.url(PATH)).open()


def test_a_server_that_is_not_there(site):
    with pytest.raises(ModelAccessError, match="cannot be reached: the connection broke"):
        locate("http://127.0.0.1:9/x.bin").open()


def test_a_pause_that_the_server_asks_for(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    patience = remote_file.Patience(pause=1, longest=30)
    for failures, asked in [(1, None), (3, None), (9, None), (1, 7.0), (1, 9999.0)]:
        patience.after(failures, asked)
    assert pauses == [1, 4, 30, 7, 30]


def test_a_missing_file(site):
    place = locate(site.url("/none.bin"))
    assert not place.is_file()
    assert place.head == b""
    with pytest.raises(
        ModelNotFoundError, match=r"/none\.bin' was not found: the server answered 404 Not Found; check"
    ):
        place.open()


@pytest.mark.parametrize("status", [401, 403])
def test_a_login_that_is_missing(site, status):
    site.statuses[PATH] = status
    with pytest.raises(ModelAccessError, match=rf"wants a login or other credentials.*answered {status}.*token"):
        locate(site.url(PATH)).open()


def test_other_refusals_name_the_status(site):
    site.statuses[PATH] = 418
    with pytest.raises(ModelAccessError, match="the server answered 418"):
        locate(site.url(PATH)).open()


def test_a_server_without_ranges_is_refused_rather_than_read_whole(site):
    site.ranges = False
    site.files["/big.bin"] = bytes(20_000_000)
    with pytest.raises(
        ModelAccessError, match=r"whole files only \(it does not know Range requests\); download the file"
    ):
        locate(site.url("/big.bin")).open()
    assert site.served <= 20_000_000
    small = locate(site.url(PATH)).open()
    assert small.read(299_000, 1_000) == CONTENT[299_000:], "a small one is taken as it comes"
    small.close()


def test_ranges_that_stop_working_are_noticed(site, opened):
    site.ranges = False
    with pytest.raises(ModelAccessError, match="whole files only"):
        opened.read(100_000, 10)


def test_a_web_page_is_recognised(site):
    site.ranges = False
    site.files["/login"] = b"<!DOCTYPE html><title>please log in</title>"
    assert "web page" in (describe_foreign(locate(site.url("/login")).head) or "")


def test_changed_content_is_noticed_while_reading(site, opened):
    site.files[PATH] = CONTENT[::-1]
    with pytest.raises(
        ChangedInputError, match=r"a\.bin: changed while it was in use \(ETag was .*, is .*\); merge again"
    ):
        opened.read(100_000, 10)
    with pytest.raises(ChangedInputError, match="changed while it was in use"):
        opened.check_unchanged()


def test_changed_size_is_noticed_without_tags(site):
    site.etags = False
    with_no_tag = RemoteFile(WebPlace(site.url(PATH)), cache=BlockCache(block=2**17))
    with_no_tag.check_unchanged()
    site.files[PATH] = CONTENT + b"more"
    with pytest.raises(ChangedInputError, match="size was 300000, is 300004"):
        with_no_tag.read(100_000, 10)
    site.files[PATH] = CONTENT[:50_000]
    with pytest.raises(ChangedInputError, match="has 50000 bytes now; it was shortened"):
        with_no_tag.read(290_000, 10)
    with_no_tag.close()


def test_a_vanished_file_is_noticed(site, opened):
    opened.check_unchanged()
    del site.files[PATH]
    for ask in (lambda: opened.read(100_000, 10), opened.check_unchanged):
        with pytest.raises(ChangedInputError, match="vanished while it was in use"):
            ask()


def test_identity_tells_contents_apart(site, opened):
    with_other = locate(site.url(PATH)).open()
    assert with_other.fingerprint == opened.fingerprint
    with_other.close()
    site.files[PATH] = CONTENT[::-1]
    with_other = locate(site.url(PATH)).open()
    assert with_other.fingerprint != opened.fingerprint
    with_other.close()


def test_redirects_are_followed_once(site):
    site.redirects["/r"] = "/s"
    site.redirects["/s"] = site.url(PATH + "?signed=1")
    file = locate(site.url("/r")).open()
    assert file.name == site.url("/r")
    site.requests.clear()
    for offset in (50_000, 100_000, 290_000):
        assert file.read(offset, 10) == CONTENT[offset : offset + 10]
        if offset == 50_000:
            assert [path for path, _ in site.requests] == ["/r", "/s", PATH + "?signed=1"]
            site.requests.clear()
    assert {path for path, _ in site.requests} <= {PATH + "?signed=1"}
    file.close()


def test_an_expired_redirect_is_asked_for_again(site):
    site.redirects["/r"] = PATH + "?signed=1"
    file = RemoteFile(WebPlace(site.url("/r")), cache=BlockCache(2**20, block=2**12, longest=2**16, ahead=0))
    file.read(50_000, 10)
    site.faults.append("403")
    assert file.read(100_000, 10) == CONTENT[100_000:100_010]
    assert not site.faults
    file.close()


def test_endless_redirects_are_refused(site):
    site.redirects["/r"] = "/r"
    with pytest.raises(ModelAccessError, match="redirects 10 times"):
        locate(site.url("/r")).open()


def test_credentials_are_used_and_never_shown(site):
    site.login = "Basic bWU6cHc="
    address = site.url(PATH).replace("http://", "http://me:pw@") + "?download=true&X-Amz-Signature=abc&token=xyz"
    place = locate(address)
    file = place.open()
    assert site.headers["Authorization"] == "Basic bWU6cHc="
    assert site.requests[-1][0].endswith("?download=true&X-Amz-Signature=abc&token=xyz"), "the server gets all of it"
    for text in (place.name, repr(place), file.name, file.fingerprint):
        assert "pw@" not in text
        assert "abc" not in text
        assert "xyz" not in text
        assert "download=true" in text
    file.close()
    site.login = "Basic other"
    with pytest.raises(ModelAccessError) as caught:
        locate(address).open()
    assert "pw@" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_password_does_not_follow_to_another_host(site):
    with serving() as other:
        other.files["/x"] = b"content"
        site.redirects["/r"] = other.url("/x")
        assert locate(site.url("/r").replace("http://", "http://me:pw@")).read(100) == b"content"
        assert "Authorization" not in other.headers
        assert "Authorization" in site.headers


def test_names_with_percent_escapes_and_queries(site):
    site.files["/models/ä b+c%.bin"] = b"1"
    site.files["/models/sub/part one.bin"] = b"2"
    place = locate(site.url("/models/%C3%A4%20b+c%25.bin?download=true"))
    assert place.read(10) == b"1"
    assert place.basename == "ä b+c%.bin"
    beside = place.parent().child("sub/part one.bin")
    assert beside.basename == "part one.bin"
    assert beside.read(10) == b"2"
    assert site.requests[-1][0] == "/models/sub/part%20one.bin?download=true"
    assert place.parent().children() == []
    with pytest.raises(FileFormatError, match="names a file"):
        place.parent().child("../secret")


def test_connections_are_used_again_and_one_that_the_server_closed_is_no_failure(site, opened):
    opened.read(40_000, 10)
    client = opened._place._client
    (kept,) = [connection for _, connection, _ in client._idle]
    kept.sock.shutdown(2)  # as if the server had hung up
    site.requests.clear()
    assert opened.read(100_000, 10) == CONTENT[100_000:100_010]
    assert len(site.requests) == 1


@forks
def test_a_child_uses_no_connection_of_its_parent(opened):
    client = opened._place._client
    opened.read(40_000, 10)
    (kept,) = [connection for _, connection, _ in client._idle]
    port = kept.sock.getsockname()[1]

    def work() -> bool:
        right = opened.read(100_000, 10) == CONTENT[100_000:100_010]
        return right and port not in [connection.sock.getsockname()[1] for _, connection, _ in client._idle]

    with client._lock:
        ended = in_child(work)
    assert ended() == 0
    assert opened.read(200_000, 10) == CONTENT[200_000:200_010]
    assert [connection.sock.getsockname()[1] for _, connection, _ in client._idle] == [port]


def test_wrong_addresses(site):
    for address in ("http:///x", "http://host:99999/x"):
        with pytest.raises(ModelAccessError, match="check"):
            locate(address).open()
    with pytest.raises(MechaError, match="cannot be read as an address"):
        locate("nonsense://x/y")
    for address in ("http://[foo/x", "http://a..b/x"):
        with pytest.raises(MechaError):
            locate(address).open()
    site.redirects["/bad"] = "http://[bad/x"
    with pytest.raises(ModelAccessError, match="no address"):
        locate(site.url("/bad")).open()


def test_a_redirect_that_leads_elsewhere_is_a_change(site):
    site.files |= {"/old": b"a" * 100, "/new": b"b" * 100}
    site.redirects["/r"] = "/old"
    file = locate(site.url("/r")).open()
    file.check_unchanged()
    site.redirects["/r"] = "/new"
    with pytest.raises(ChangedInputError):
        file.check_unchanged()


def test_a_proxy_is_asked_when_the_environment_names_one(site, monkeypatch):
    monkeypatch.setenv("http_proxy", site.address.replace("http://", "http://me:pw@"))
    monkeypatch.setenv("no_proxy", "")
    site.files["/y"] = b"from the proxy"
    assert locate("http://nowhere.invalid/y").read(100) == b"from the proxy"
    assert site.headers["Host"] == "nowhere.invalid"
    assert site.headers["Proxy-Authorization"] == "Basic bWU6cHc="


def test_nothing_else_is_started_or_left_behind(site: Site) -> None:
    file = locate(site.url(PATH)).open()
    file.read(0, 100_000)
    file.close()
    deadline = time.monotonic() + 5
    while any("read-ahead" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
