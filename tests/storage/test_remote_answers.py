"""Answers of web servers that have another range, or another number of bytes, than they say or were asked for."""

from __future__ import annotations

import http.server
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from sd_mecha.errors import ChangedInputError, ModelAccessError
from sd_mecha.storage.remote import file as remote_file
from sd_mecha.storage.remote.block_cache import BlockCache
from sd_mecha.storage.remote.file import RemoteFile
from sd_mecha.storage.remote.web import WebPlace
from tests.formats.web_server import listening

CONTENT = bytes(i * 7 % 251 for i in range(300_000))
SIZE = len(CONTENT)


class Answer(NamedTuple):
    """A 206, with what it says of itself."""

    body: bytes
    range: str
    chunked: bool = False
    header: tuple[str, str] = ("Content-Type", "application/octet-stream")
    closing: bool = False


Site = Callable[[int, int], Answer]


def proper(first: int, last: int) -> Answer:
    return Answer(CONTENT[first : last + 1], f"bytes {first}-{last}/{SIZE}")


@contextmanager
def opened(answer: Site) -> Iterator[tuple[RemoteFile, list[tuple[int, int]]]]:
    """The file of a server that answers so, and the ranges it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
            asked.append((first, last))
            sent = answer(first, min(last, SIZE - 1))
            self.send_response(206)
            self.send_header("Content-Range", sent.range)
            self.send_header(*sent.header)  # of a length that is given twice, the first one counts
            body = sent.body
            if sent.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                pieces = [body[i : i + 7_000] for i in range(0, len(body), 7_000)]
                body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])
            elif sent.closing:
                self.send_header("Connection", "close")
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:  # a client that has seen enough
                self.close_connection = True

    with listening(Handler) as address:
        file = RemoteFile(WebPlace(address + "/a.bin"), cache=BlockCache(2**20, block=2**12, longest=2**16, ahead=0))
        try:
            yield file, asked
        finally:
            file.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote_file.PATIENCE, "pause", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def multipart(first: int, last: int) -> Answer:
    part = CONTENT[first : last + 1]
    body = b"--x\r\nContent-Range: bytes %d-%d/%d\r\n\r\n%s\r\n--x--\r\n" % (first, last, SIZE, part)
    return Answer(body, f"bytes {first}-{last}/{SIZE}", header=("Content-Type", "multipart/byteranges; boundary=x"))


MISFITS = {
    "the whole file": lambda first, last: proper(first, last)._replace(body=CONTENT),
    "the whole file in chunks": lambda first, last: proper(first, last)._replace(body=CONTENT, chunked=True),
    "a byte more": lambda first, last: proper(first, last)._replace(body=CONTENT[first : last + 2]),
    "a byte more in chunks": lambda first, last: Answer(
        CONTENT[first : last + 2], f"bytes {first}-{last}/{SIZE}", chunked=True
    ),
    "less than it says": lambda first, last: proper(first, last)._replace(body=CONTENT[first:last]),
    "several parts": multipart,
    "a length that is no number": lambda first, last: proper(first, last)._replace(header=("Content-Length", "many")),
    "another range": lambda first, last: proper(first + 1_000, last + 1_000),
    "a range without bytes": lambda first, last: proper(first, last)._replace(range=f"bytes */{SIZE}"),
    "a range beyond the end": lambda first, last: proper(first, last)._replace(range=f"bytes {first}-{last}/{last}"),
}
BAD = pytest.mark.parametrize("bad", MISFITS.values(), ids=MISFITS)


@BAD
def test_a_first_answer_that_does_not_fit_is_refused(bad):
    with (
        pytest.raises(ModelAccessError, match=r"a\.bin: asked for bytes from 0 on, got .*; download the file"),
        opened(bad),
    ):
        pass


@BAD
def test_a_later_answer_that_does_not_fit_is_refused_and_nothing_of_it_is_kept(bad):
    good = True
    with opened(lambda first, last: (proper if good else bad)(first, last)) as (file, _):
        good = False
        with pytest.raises((ModelAccessError, ChangedInputError)):
            file.read(100_000, 20_000)
        good = True
        assert file.read(100_000, 20_000) == CONTENT[100_000:120_000]


def test_a_compressed_answer_is_refused():
    with (
        pytest.raises(ModelAccessError, match=r"the server sends it compressed \(gzip\)"),
        opened(lambda first, last: proper(first, last)._replace(header=("Content-Encoding", "gzip"))),
    ):
        pass


@pytest.mark.parametrize("size", [10**15, 10**18 - 1])
def test_a_size_that_no_file_has_is_refused(size):
    with (
        pytest.raises(ModelAccessError, match=rf"a\.bin: has {size} bytes; expected at most"),
        opened(lambda first, last: proper(first, last)._replace(range=f"bytes {first}-{last}/{size}")),
    ):
        pass


def test_too_few_bytes_in_chunks_are_asked_for_again():
    cut = 0

    def answer(first: int, last: int) -> Answer:
        short = proper(first, last)
        return short._replace(body=short.body[: len(short.body) - cut], chunked=True)

    with opened(answer) as (file, _):
        assert file.read(100_000, 20_000) == CONTENT[100_000:120_000]
        cut = 1
        with pytest.raises(ModelAccessError, match="the connection ended after"):
            file.read(200_000, 20_000)


def test_chunks_leave_the_connection_usable():
    with opened(lambda first, last: proper(first, last)._replace(chunked=True)) as (file, _):
        file.read(100_000, 20_000)
        assert len(file._place._client._idle) == 1


def test_a_server_that_sends_so_many_bytes_at_a_time_is_read():
    with opened(lambda first, last: proper(first, min(last, first + 4_999))) as (file, asked):
        assert file.read(0, SIZE) == CONTENT
    assert len(asked) < SIZE / 5_000 * 1.5


@pytest.mark.parametrize("way", [{}, {"chunked": True}, {"closing": True}], ids=str)
def test_a_server_that_sends_more_than_was_asked_for_is_read(way):
    with opened(lambda first, last: proper(first, SIZE - 1)._replace(**way)) as (file, _):
        assert file.read(100_000, 20_000) == CONTENT[100_000:120_000]


@pytest.mark.parametrize("way", [{"chunked": True}, {"closing": True}], ids=str)
def test_less_than_was_asked_for_of_an_answer_that_says_more_is_refused(way):
    cut = SIZE

    def answer(first: int, last: int) -> Answer:
        return Answer(CONTENT[first:cut], f"bytes {first}-{SIZE - 1}/{SIZE}", **way)

    with opened(answer) as (file, _):
        cut = 210_000
        with pytest.raises(ModelAccessError, match="the connection ended after"):
            file.read(200_000, 20_000)


def test_a_server_that_repeats_an_end_beyond_the_file_is_read():
    def answer(first: int, last: int) -> Answer:
        said = last + 1_000 if last == SIZE - 1 else last
        return proper(first, last)._replace(range=f"bytes {first}-{said}/{SIZE}")

    with opened(answer) as (file, _):
        assert file.read(SIZE - 20_000, 20_000) == CONTENT[-20_000:]


def test_a_length_with_zeros_before_it_is_read():
    def answer(first: int, last: int) -> Answer:
        return proper(first, last)._replace(header=("Content-Length", f"000{last + 1 - first}"))

    with opened(answer) as (file, _):
        assert file.read(100_000, 20_000) == CONTENT[100_000:120_000]
