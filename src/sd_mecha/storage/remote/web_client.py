"""A client of the web for many threads: it keeps connections, follows redirects and goes through proxies."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from sd_mecha.errors import MechaError, ModelAccessError
from sd_mecha.storage.remote import addresses
from sd_mecha.storage.remote.forks import renew_in_child
from sd_mecha.storage.remote.places import InterruptedFetch

TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
IDLE = 20.0
"""Seconds after which an idle connection is not trusted any more; servers close theirs some time."""

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class WebClient:
    """Sends GET requests.

    Args:
        keep: how many idle connections are kept for the next request.
    """

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._idle: list[tuple[_Origin, http.client.HTTPConnection, float]] = []
        self._moved: dict[str, str] = {}  # where redirects of an address led
        self._proxies: dict[_Origin, SplitResult | None] = {}
        self._lock = threading.Lock()
        renew_in_child(self)

    def renew(self) -> None:
        """Keep no connection for now. To close one says nothing to the server, which goes on talking to the parent."""
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for _, connection, _ in idle:
            connection.close()

    @contextlib.contextmanager
    def get(self, address: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, whatever its status; its connection is kept if the body was read to its end.

        Raises:
            InterruptedFetch: the connection broke, while asking or in the body of the `with` statement.
            ModelAccessError: the address cannot be asked at all.
        """
        name = addresses.shown(address)
        try:
            origin, connection, answer = self._follow(address, headers)
        except (OSError, http.client.HTTPException) as error:
            raise _failure(name, error) from error
        try:
            yield answer
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if not _is_failure(error):
                raise
            raise _failure(name, error) from error
        except BaseException:
            connection.close()
            raise
        if answer.isclosed() and not answer.will_close:
            self._give_back(origin, connection)
        else:
            connection.close()

    def close(self) -> None:
        """Keep no connection any more."""
        with self._lock:
            self._keep = 0
            idle, self._idle = self._idle, []
        for _, connection, _ in idle:
            connection.close()

    def forget_redirect(self, address: str) -> None:
        """Ask that address itself next time, not where it led."""
        self._moved.pop(address, None)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def _follow(
        self, address: str, headers: Mapping[str, str]
    ) -> tuple[_Origin, http.client.HTTPConnection, http.client.HTTPResponse]:
        try:
            return self._followed(address, headers)
        except ValueError as error:
            if isinstance(error, MechaError):
                raise
            raise ModelAccessError(
                f"{addresses.shown(address)}: it, or what it leads to, is no address: {error}; check it"
            ) from error

    def _followed(
        self, address: str, headers: Mapping[str, str]
    ) -> tuple[_Origin, http.client.HTTPConnection, http.client.HTTPResponse]:
        first = urlsplit(address)
        url = self._moved.get(address, address)
        for _ in range(_MOST_REDIRECTS):
            parts = urlsplit(url)
            own = dict(headers)
            if parts.username is not None or _origin(parts) == _origin(first):  # a password is for one host only
                own |= _login(parts if parts.username is not None else first)
            origin, connection, answer = self._ask(parts, own)
            target = answer.getheader("Location")
            if answer.status in _REDIRECTS and target:
                connection.close()
                url = urljoin(url, target)
                continue
            if answer.status >= 400 and address in self._moved:  # a signed address has expired
                connection.close()
                self._moved.pop(address, None)
                url = address
                continue
            if url != address and answer.status < 400:
                self._moved[address] = url
            return origin, connection, answer
        raise ModelAccessError(f"{addresses.shown(address)}: redirects {_MOST_REDIRECTS} times; check the address")

    def _ask(
        self, parts: SplitResult, headers: Mapping[str, str]
    ) -> tuple[_Origin, http.client.HTTPConnection, http.client.HTTPResponse]:
        origin = _origin(parts)
        target = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*[]") + (
            "?" + quote(parts.query, safe="/%:=&~+!$,;'@()*[]?") if parts.query else ""
        )
        if origin not in self._proxies:  # to look it up takes as long as all the rest
            self._proxies[origin] = _proxy(origin)
        proxy = self._proxies[origin]
        own = {"Accept-Encoding": "identity", "User-Agent": "sd-mecha", **headers}
        if proxy is not None and origin.scheme == "http":
            target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            own |= _login(proxy, "Proxy-Authorization")
        while True:
            connection = self._take(origin)
            kept = connection is not None
            if connection is None:
                connection = _connect(origin, proxy)
            try:
                connection.request("GET", target, headers=own)
                _acknowledge_at_once(connection)
                return origin, connection, connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                if not kept:
                    raise  # a kept one may have been closed by the server meanwhile: that says nothing
            except BaseException:
                connection.close()
                raise

    def _take(self, origin: _Origin) -> http.client.HTTPConnection | None:
        with self._lock:
            for index in reversed(range(len(self._idle))):
                where, connection, since = self._idle[index]
                if time.monotonic() - since > IDLE:
                    connection.close()
                    del self._idle[index]
                elif where == origin:
                    del self._idle[index]
                    return connection
        return None

    def _give_back(self, origin: _Origin, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < self._keep:
                self._idle.append((origin, connection, time.monotonic()))
                return
        connection.close()


def _origin(parts: SplitResult) -> _Origin:
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https") or not parts.hostname:
        raise ModelAccessError(f"{addresses.shown(parts.geturl())}: is no address of the web; check it")
    try:
        port = parts.port
    except ValueError as error:
        raise ModelAccessError(f"{addresses.shown(parts.geturl())}: {error}; check the address") from error
    return _Origin(scheme, parts.hostname, port or (443 if scheme == "https" else 80))


def _login(parts: SplitResult, header: str = "Authorization") -> dict[str, str]:
    if parts.username is None:
        return {}
    text = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: "Basic " + base64.b64encode(text.encode()).decode()}


def _proxy(origin: _Origin) -> SplitResult | None:
    """The proxy that the environment names for a host."""
    address = urllib.request.getproxies().get(origin.scheme)
    if not address or urllib.request.proxy_bypass(origin.host):
        return None
    return urlsplit(address if "://" in address else f"http://{address}")


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(origin: _Origin, proxy: SplitResult | None) -> http.client.HTTPConnection:
    host, port = origin.host, origin.port
    if proxy is not None:
        host, port = proxy.hostname or "", proxy.port or 80
    if origin.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=_tls())
    if proxy is not None:
        connection.set_tunnel(origin.host, origin.port, _login(proxy, "Proxy-Authorization"))
    return connection


def _acknowledge_at_once(connection: http.client.HTTPConnection) -> None:
    """Have the system acknowledge the answer without delay.

    Servers that write head and body of an answer separately may hold the end of the body back until what came before
    is acknowledged, which systems like to put off for 40 ms. The option holds for a while only, hence for one answer.
    """
    option = getattr(socket, "TCP_QUICKACK", None)
    if option is not None and connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.setsockopt(socket.IPPROTO_TCP, option, 1)


def _is_failure(error: BaseException) -> bool:
    """Whether it comes from the connection rather than from whoever used the answer."""
    return isinstance(error, http.client.HTTPException | ssl.SSLError | ConnectionError | TimeoutError)


def _failure(name: str, error: OSError | http.client.HTTPException) -> Exception:
    if isinstance(error, ModelAccessError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return ModelAccessError(f"{name}: the certificate of the server is not valid: {error.verify_message}")
    if isinstance(error, http.client.InvalidURL):
        return ModelAccessError(f"{name}: {error}; check the address")
    if isinstance(error, socket.gaierror):
        return InterruptedFetch(f"the host is not known ({error.strerror})")
    if isinstance(error, TimeoutError):
        return InterruptedFetch(f"no answer within {TIMEOUT:g} seconds")
    return InterruptedFetch(f"the connection broke ({error or type(error).__name__})")
