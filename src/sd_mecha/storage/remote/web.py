"""Files on the web, read by range.

fsspec reads `http://` too, through aiohttp, but takes whatever body arrives for the range that it asked for: a
server that ignores ranges makes it load the whole file, a file that was replaced meanwhile mixes with the old one,
and signed addresses are quoted anew. All answers are therefore checked here, over the client of the standard library,
which also reads straight into our buffers, and needs no event loop and no further package. fsspec serves all other
protocols.

One GET of the first bytes finds out all there is to know: size, identity and whether ranges are served. (HEAD
would not do: addresses that are signed for GET refuse it.)
"""

from __future__ import annotations

import http.client
import re
from dataclasses import replace
from urllib.parse import urlsplit

from sd_mecha.errors import ChangedInputError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.remote import addresses
from sd_mecha.storage.remote.places import HEAD, Found, InterruptedFetch
from sd_mecha.storage.remote.sinks import CountingSink, LendingSink, Sink
from sd_mecha.storage.remote.web_client import WebClient

WHOLE = 2**20
"""The largest file that is taken from a server without ranges."""
PIECE = 256 * 2**10
"""Bytes that are received at a time."""

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})$")


class WebPlace:
    """An address that starts with `http://` or `https://`.

    Args:
        address: the address, with user and password or tokens if it needs them.
    """

    def __init__(self, address: str, *, client: WebClient | None = None) -> None:
        self._address = address
        self._client = client or WebClient(keep=0)
        self.name = addresses.shown(address)

    @property
    def basename(self) -> str:
        return addresses.last_name(self._address)

    def find(self) -> Found:
        self._client.forget_redirect(self._address)  # it may lead elsewhere by now
        with self._client.get(self._address, {"Range": f"bytes=0-{HEAD - 1}"}) as answer:
            if answer.status == 200:
                return self._without_ranges(answer)
            total, end = self._check(answer, 0, fetching=False)
            head = bytearray()
            self._receive(answer, 0, min(HEAD, end), end, head.extend)
            return Found(total, _marks(answer), bytes(head))

    def fetch(self, found: Found, start: int, stop: int, sink: Sink) -> None:
        with self._client.get(self._address, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            total, end = self._check(answer, start, fetching=True)
            found.compare(self.name, replace(found, size=total, marks=_marks(answer)))
            self._receive(answer, start, min(stop, end), end, sink)

    def is_folder(self) -> bool:
        return False  # the web knows files only

    def children(self) -> list[str]:
        return []

    def below(self, names: tuple[str, ...]) -> WebPlace:
        return WebPlace(addresses.below(self._address, names))

    def above(self) -> WebPlace:
        return WebPlace(addresses.above(self._address))

    def opened(self) -> WebPlace:
        return WebPlace(self._address, client=WebClient())

    def close(self) -> None:
        self._client.close()

    def _check(self, answer: http.client.HTTPResponse, start: int, *, fetching: bool) -> tuple[int, int]:
        """The size of the file and where the range ends that comes, if this is the answer that was hoped for."""
        if answer.status not in (206, 416):
            raise self._refusal(answer, fetching)
        sent = _CONTENT_RANGE.match(answer.getheader("Content-Range", ""))
        if sent is None:
            raise ModelAccessError(f"{self.name}: the server does not say how large the file is; download it first")
        total = int(sent[3])
        if answer.status == 416 and (fetching or total):
            raise ChangedInputError(f"{self.name}: has {total} bytes now; it was shortened; merge again")
        if answer.status == 416:  # an empty file has no first byte
            return 0, 0
        self._check_encoding(answer)
        first, end = (int(sent[1]), int(sent[2]) + 1) if sent[1] else (0, 0)
        end = min(end, total)  # some servers repeat what they were asked for
        if not start == first < end:
            raise self._misfit(start, f"{sent[0]!r}")
        said = "" if answer.chunked else answer.headers.get("Content-Length", "").strip()
        if said and said.lstrip("0") != str(end - first):
            raise self._misfit(start, f"{said} bytes as {sent[0]!r}")
        return total, end

    def _misfit(self, start: int, came: str) -> ModelAccessError:
        return ModelAccessError(
            f"{self.name}: asked for bytes from {start} on, got {came}: the server, or a proxy before it, does not "
            "keep to ranges; download the file and name the copy"
        )

    def _refusal(self, answer: http.client.HTTPResponse, fetching: bool) -> MechaError | InterruptedFetch:
        said = f"{answer.status} {answer.reason}".strip()
        if answer.status in _BUSY:
            wait = answer.getheader("Retry-After", "")
            return InterruptedFetch(f"the server answered {said}", float(wait) if wait.isdecimal() else None)
        if answer.status in (404, 410):
            if fetching:
                return ChangedInputError(f"{self.name}: vanished while it was in use: the server answered {said}")
            return ModelNotFoundError(
                f"model {self.name!r} was not found: the server answered {said}; check the address"
            )
        if answer.status in (401, 403, 407):
            host = urlsplit(self._address).hostname or ""
            step = "use an address that carries its token, or https://user:password@host/..."
            if host.endswith("huggingface.co"):
                step = "use hf://owner/repository/file with the token of a login in HF_TOKEN"
            return ModelAccessError(
                f"{self.name}: the server wants a login or other credentials, or the link has expired "
                f"(it answered {said}); {step}"
            )
        if answer.status == 200:
            return self._no_ranges()
        return ModelAccessError(f"{self.name}: cannot be read: the server answered {said}; check the address")

    def _without_ranges(self, answer: http.client.HTTPResponse) -> Found:
        """A server that sends the whole file has to be left, unless the file is small."""
        self._check_encoding(answer)
        if answer.length is not None and answer.length > WHOLE:
            raise self._no_ranges()
        data = answer.read(WHOLE + 1)
        if len(data) > WHOLE:
            raise self._no_ranges()
        if answer.length:
            raise InterruptedFetch(f"the connection ended after {len(data)} bytes")
        return Found(len(data), _marks(answer), data)

    def _no_ranges(self) -> ModelAccessError:
        return ModelAccessError(
            f"{self.name}: the server sends whole files only (it does not know Range requests); "
            "download the file and name the copy"
        )

    def _check_encoding(self, answer: http.client.HTTPResponse) -> None:
        encoding = answer.getheader("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise ModelAccessError(f"{self.name}: the server sends it compressed ({encoding}); download it first")

    def _receive(self, answer: http.client.HTTPResponse, start: int, stop: int, end: int, sink: Sink) -> None:
        """Hand on that range, with which the body begins; it goes on to `end`."""
        done, length = 0, stop - start
        if answer.length is None and length and stop == end:  # its end alone shows whether all of it is right
            body = answer.read(length + 1)
            if len(body) < length:
                raise InterruptedFetch(f"the connection ended after {len(body)} of {length} bytes")
            if len(body) > length:
                raise self._misfit(start, f"more than {length} bytes")
            return sink(memoryview(body))
        target = sink if isinstance(sink, LendingSink) else CountingSink(sink, min(PIECE, length))
        while done < length:
            count = answer.readinto(target.room()[: min(PIECE, length - done)])
            if not count:
                raise InterruptedFetch(f"the connection ended after {done} of {length} bytes")
            target.took(count)
            done += count


def _marks(answer: http.client.HTTPResponse) -> dict[str, str]:
    """ETag and time of the content; whether the tag is a weak one may differ between answers."""
    marks = {
        "ETag": answer.getheader("ETag", "").removeprefix("W/"),
        "Last-Modified": answer.getheader("Last-Modified", ""),
    }
    return {name: value for name, value in marks.items() if value}
