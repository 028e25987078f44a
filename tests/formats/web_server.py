"""A real web server on this computer, which misbehaves as it is told to."""

from __future__ import annotations

import http.server
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit


class Site:
    """What the server has, how it behaves, and what was asked of it.

    Attributes:
        files: content by path; changing it changes the ETag.
        faults: what happens to the next requests, one each: "drop" (the connection is cut within the body), "short"
            (a proper answer that has fewer bytes than were asked for), "close" (no answer at all), "ok", or a status.
        statuses: paths that always get that status.
        redirects: paths that lead elsewhere.
        ranges: whether Range requests are understood.
        etags: whether the content has a tag.
        delay: seconds before each answer.
        login: the Authorization header that is wanted, if one is.
        requests: path with query and Range of every request.
        headers: all headers of the last request.
        served: bytes of bodies.
        busiest: most requests that were answered at the same time.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: deque[str] = deque()
        self.statuses: dict[str, int] = {}
        self.redirects: dict[str, str] = {}
        self.ranges = True
        self.etags = True
        self.delay = 0.0
        self.login = ""
        self.requests: list[tuple[str, str]] = []
        self.headers: dict[str, str] = {}
        self.served = 0
        self.busy = self.busiest = 0
        self.address = ""
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return self.address + path


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    site: Site

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        site = self.site
        with site.lock:
            site.requests.append((self.path, self.headers.get("Range", "")))
            site.headers = dict(self.headers.items())
            site.busy += 1
            site.busiest = max(site.busiest, site.busy)
            fault = site.faults.popleft() if site.faults else "ok"
        try:
            time.sleep(site.delay)
            self._answer(fault)
        finally:
            with site.lock:
                site.busy -= 1

    def _answer(self, fault: str) -> None:
        site, path = self.site, unquote(urlsplit(self.path).path)
        if fault == "close":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if path in site.redirects:
            return self._status(302, Location=site.redirects[path])
        if site.login and self.headers.get("Authorization") != site.login:
            return self._status(401)
        if fault.isdecimal() or path in site.statuses:
            return self._status(int(fault) if fault.isdecimal() else site.statuses[path])
        data = site.files.get(path)
        if data is None:
            return self._status(404)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if site.ranges else None
        if wanted is None:
            self.send_response(200)
            body = memoryview(data)
        else:
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            if fault == "short":
                last = (first + last) // 2
            if first >= len(data):
                return self._status(416, **{"Content-Range": f"bytes */{len(data)}"})
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            body = memoryview(data)[first : last + 1]
        if site.etags:
            self.send_header("ETag", f'"{hash(data):x}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "drop":
            body = body[: len(body) // 2]
            self.close_connection = True
        with site.lock:
            site.served += len(body)
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def _status(self, status: int, **headers: str) -> None:
        body = b"<html>no</html>"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is nothing to talk about."""


@contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on a port of its own, until the end of the `with` statement."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving() -> Iterator[Site]:
    """A site, until the end of the `with` statement."""
    site = Site()
    with listening(type("Handler", (_Handler,), {"site": site})) as site.address:
        yield site
