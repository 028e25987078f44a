"""A Hugging Face hub on this computer: what its library asks a hub for to read files, answered as the real one does.

Weights lie elsewhere, as they do there: the hub sends who asks for them to another server, by a signed address.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import quote, unquote, urlsplit

from tests.formats.web_server import Site, listening, serving

SIGNATURE = "X-Amz-Signature=s3cret"

Files = dict[str, bytes]

_REPO = r"((?:datasets/|spaces/)?[^/]+/[^/]+)"


class Hub:
    """What the hub has, and what was asked of it.

    Attributes:
        repos: files by revision by repository; the commit of a revision is made of its files. Names of data sets
            and spaces begin with `datasets/` or `spaces/`.
        history: files by commit by repository, of commits that somebody asked about. They stay when a revision
            goes on, as they do there.
        private: repositories that are there for nobody without the token.
        gated: repositories whose files are given to nobody without the token.
        token: the one that is right.
        storage: the server with the weights.
        requests: method, path with query, Range and Authorization of every request.
        faults: what happens to the next requests, one each: "close" (no answer at all) or "ok".
    """

    def __init__(self, storage: Site) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.history: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.token = "hf_right"
        self.storage = storage
        self.requests: list[tuple[str, str, str, str]] = []
        self.faults: deque[str] = deque()
        self.address = ""
        self.lock = threading.Lock()

    def files(self, repo: str, revision: str) -> Files | None:
        """The files of a branch, a tag or a commit, if there is one."""
        revisions, history = self.repos[repo], self.history.setdefault(repo, {})
        history |= {commit(files): files for files in revisions.values()}
        return revisions.get(revision) or history.get(revision)


def commit(files: Files) -> str:
    """The commit that files make."""
    return blob(repr(sorted((path, blob(data)) for path, data in files.items())).encode())


def is_large(path: str) -> bool:
    """Whether a file lies elsewhere."""
    return path.endswith((".safetensors", ".bin", ".gguf"))


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        login, ranged = (self.headers.get(name, "") for name in ("Authorization", "Range"))
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, ranged, login))
            fault = self.hub.faults.popleft() if self.hub.faults else "ok"
        if fault == "close":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        try:
            self._answer(urlsplit(self.path).path)
        except _Refusal as refusal:
            self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), **refusal.headers)

    do_HEAD = do_GET

    def _answer(self, path: str) -> None:
        path = re.sub("^/api/models/", "/api/", path)
        if found := re.fullmatch(rf"/api/{_REPO}(?:/revision/([^/]+))?", path):
            repo, _, files = self._files(found[1], found[2] or "main")
            self._send_json({"id": repo, "sha": commit(files), "private": repo in self.hub.private, "siblings": []})
        elif found := re.fullmatch(rf"/api/{_REPO}/tree/([^/]+)(?:/([^/]+))?", path):
            self._tree(self._files(found[1], found[2])[2], unquote(found[3] or ""))
        elif found := re.fullmatch(rf"/{_REPO}/resolve/([^/]+)/(.+)", path):
            self._resolve(*self._files(found[1], found[2]), unquote(found[3]))
        elif found := re.fullmatch(rf"/api/resolve-cache/{_REPO}/([^/]+)/(.+)", path):
            self._small(self._files(found[1], found[2])[2][unquote(found[3])])
        else:
            raise _Refusal(404, "", "Sorry, we can't find the page you are looking for.")

    def _files(self, repo: str, revision: str) -> tuple[str, str, Files]:
        known = self._is_known()
        if self.headers.get("Authorization") and not known:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        if repo not in self.hub.repos or (repo in self.hub.private and not known):
            # Without a login, the real hub sends no code; its library then goes by the https:// of the address.
            raise _Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        files = self.hub.files(repo, unquote(revision))
        if files is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return repo, unquote(revision), files

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _tree(self, files: Files, folder: str) -> None:
        start = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, object]] = {}
        for path, data in files.items():
            name, below, _ = path.removeprefix(start).partition("/")
            if not path.startswith(start):
                continue
            if below:
                entries[name] = {"type": "directory", "oid": commit(files), "size": 0, "path": start + name}
                continue
            entry: dict[str, object] = {"type": "file", "oid": blob(data), "size": len(data), "path": path}
            if is_large(path):
                pointer = pointer_to(data)
                entry["oid"] = blob(pointer)
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer)}
            entries[name] = entry
        if not entries and folder:
            raise _Refusal(404, "EntryNotFound", f"{folder} does not exist")
        self._send_json(list(entries.values()))

    def _resolve(self, repo: str, revision: str, files: Files, path: str) -> None:
        if repo in self.hub.gated and not self._is_known():
            raise _Refusal(
                401,
                "GatedRepo",
                f"Access to model {repo} is restricted. You must have access to it and be authenticated to access it. "
                "Please log in.",
            )
        if path not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        data = files[path]
        headers = {"X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            place = f"/{sha256(data)}"
            self.hub.storage.files[place] = data
            self._send(302, b"Found", Location=f"{self.hub.storage.address}{place}?{SIGNATURE}", **headers)
        else:
            place = f"/api/resolve-cache/{repo}/{commit(files)}/{quote(path)}"
            self._send(307, b"Temporary Redirect", Location=place, ETag=f'"{blob(data)}"', **headers)

    def _small(self, data: bytes) -> None:
        headers = {"ETag": f'"{blob(data)}"'}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self._send(206 if wanted else 200, data, **headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@lru_cache(64)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(64)
def blob(data: bytes) -> str:
    """What git calls a file with that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer_to(data: bytes) -> bytes:
    """What git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


@contextmanager
def hub_serving() -> Iterator[Hub]:
    """A hub, until the end of the `with` statement."""
    with serving() as storage:
        hub = Hub(storage)
        with listening(type("Handler", (_Handler,), {"hub": hub})) as hub.address:
            yield hub
