"""Files at addresses that fsspec knows: `s3://`, `hf://`, `gs://`, `sftp://`, `memory://` and many more.

fsspec's own caches are switched off, for `block_cache` stands in front of all remote files. Its file objects
have a position, so each is used by one thread at a time; file systems whose files are no such objects are asked
for ranges by path.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from sd_mecha.errors import ChangedInputError, MechaError, ModelAccessError, ModelNotFoundError
from sd_mecha.storage.remote.addresses import shown
from sd_mecha.storage.remote.forks import renew_in_child
from sd_mecha.storage.remote.places import HEAD, Found, InterruptedFetch
from sd_mecha.storage.remote.sinks import Sink

_EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "hf"}
_MARKS = (
    *("ETag", "etag", "VersionId", "version_id", "generation", "md5", "content_md5", "sha256", "blob_id"),
    *("LastModified", "last_modified", "modified", "mtime", "created", "ino"),
)
"""What file systems call that which tells a content from another."""

_HUB_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_CREDENTIALS = "set them as the library behind it expects"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


class FilesystemPlace:
    """An address in some file system.

    Args:
        address: the address.
        system: the file system, if it is known already.
        path: its own name for the place.

    Raises:
        MechaError: fsspec does not know such addresses, or lacks a library for them; nothing was asked yet.
    """

    def __init__(self, address: str, system: Any = None, path: str = "") -> None:
        self._address = address
        self._system, self._path = (system, path) if system is not None else _resolve(address)
        self._files: list[Any] = []
        self._keep = 0
        self.name = shown(address)
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """The files stay: all that they have for themselves is a position."""
        self._lock = threading.Lock()

    @property
    def basename(self) -> str:
        return self._address.rstrip("/").rpartition("/")[2]

    @property
    def _is_hub(self) -> bool:
        return self._address[:5].lower() == "hf://"

    def find(self) -> Found:
        try:
            self._system.invalidate_cache(self._path)
            details = self._system.info(self._path)
        except Exception as error:
            self._fail(error, fetching=False)
        if details.get("type") == "directory":
            raise ModelNotFoundError(f"model {self.name!r} is a folder; name a model file in it")
        if not isinstance(details.get("size"), int):
            raise ModelAccessError(f"{self.name}: the file system does not say how large it is; download it first")
        found = Found(details["size"], _marks(details), b"")
        head = bytearray()
        if found.size:
            self.fetch(found, 0, min(HEAD, found.size), head.extend)
        return replace(found, head=bytes(head))

    def fetch(self, found: Found, start: int, stop: int, sink: Sink) -> None:
        try:
            data = self._read(found, start, stop)
        except Exception as error:
            self._fail(error, fetching=True)
        if len(data) > stop - start:  # and may start anywhere
            raise ModelAccessError(
                f"{self.name}: {len(data)} bytes came where {stop - start} were asked for: the server, or a proxy "
                "before it, sends whole files only; download the file and name the copy"
            )
        sink(memoryview(data))
        if len(data) < stop - start:
            raise InterruptedFetch(f"got {len(data)} of {stop - start} bytes")

    def is_folder(self) -> bool:
        try:
            self._system.invalidate_cache(self._path)
            return bool(self._system.isdir(self._path))
        except Exception as error:
            self._fail(error, fetching=False)

    def children(self) -> list[str]:
        try:
            self._system.invalidate_cache(self._path)
            names = self._system.ls(self._path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            self._fail(error, fetching=False)
        return sorted({str(name).rstrip("/").rpartition("/")[2] for name in names} - {""})

    def below(self, names: tuple[str, ...]) -> FilesystemPlace:
        address, path = ("/".join([start.rstrip("/"), *names]) for start in (self._address, self._path))
        return FilesystemPlace(address, self._system, path)

    def above(self) -> FilesystemPlace:
        scheme, _, rest = self._address.rstrip("/").partition("://")
        path = self._path.rstrip("/").rpartition("/")[0]
        return FilesystemPlace(f"{scheme}://{rest.rpartition('/')[0]}", self._system, path)

    def opened(self) -> FilesystemPlace:
        place = FilesystemPlace(self._address, self._system, self._path)
        place._keep = 8
        return place

    def close(self) -> None:
        with self._lock:
            self._keep = 0
            files, self._files = self._files, []
        for file in files:
            file.close()

    def _read(self, found: Found, start: int, stop: int) -> bytes:
        from fsspec.spec import AbstractBufferedFile

        with self._lock:
            file = self._files.pop() if self._files else None
        if file is None:
            file = self._system.open(self._path, "rb", cache_type="none")
            if not isinstance(file, AbstractBufferedFile):
                file.close()
                return bytes(self._system.cat_file(self._path, start=start, end=stop))
            found.compare(self.name, Found(file.size, _marks(file.details), b""))
        try:
            file.seek(start)
            data = bytes(file.read(stop - start))
        except BaseException:
            file.close()
            raise
        with self._lock:
            if len(self._files) < self._keep:
                self._files.append(file)
                return data
        file.close()
        return data

    def _fail(self, error: Exception, *, fetching: bool) -> NoReturn:
        """Tell errors that another try may mend from those that it will not."""
        if isinstance(error, MechaError):
            raise error
        said, status = _said(error), _status(error)
        if self._is_hub:
            said = self._system.as_written(said)
        if isinstance(error, IsADirectoryError):
            raise ModelNotFoundError(f"model {self.name!r} is a folder; name a model file in it") from error
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            if fetching:
                raise ChangedInputError(f"{self.name}: vanished while it was in use: {said}") from error
            login = f"; if it is private, {_HUB_LOGIN}" if self._is_hub else ""
            raise ModelNotFoundError(f"model {self.name!r} was not found ({said}); check the address{login}") from error
        # s3fs says FileExpired where the object has another ETag than when it was opened.
        if type(error).__name__ == "FileExpired" or (fetching and status == 416):
            raise ChangedInputError(f"{self.name}: changed while it was in use ({said}); merge again") from error
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__ or status in (401, 403):
            step = f"accept its terms on the hub if it has any, and {_HUB_LOGIN}" if self._is_hub else _CREDENTIALS
            raise ModelAccessError(
                f"{self.name}: may not be read: it wants a login or other credentials ({said}); {step}"
            ) from error
        if isinstance(error, ValueError | TypeError | NotImplementedError | ImportError):
            raise ModelAccessError(f"{self.name}: cannot be read: {said}; check the address") from error
        if type(error).__name__ == "OfflineModeIsEnabled":  # huggingface_hub: the user wants nothing to be asked
            raise ModelAccessError(f"{self.name}: cannot be read: {said}") from error
        raise InterruptedFetch(said) from error


def _marks(details: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(details[name]) for name in _MARKS if details.get(name) is not None}


def _said(error: Exception) -> str:
    """What an error says, in one line; the addresses in it are often signed."""
    words = _ADDRESS.sub(lambda found: shown(found[0]), " ".join(str(error).split()))
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _status(error: Exception) -> int | None:
    """What the server answered, where the library tells."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _resolve(address: str) -> tuple[Any, str]:
    """The file system that an address belongs to, and what the place is called there."""
    name, scheme = shown(address), address.partition("://")[0].lower()
    extra = _EXTRAS.get(scheme, "remote")
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MechaError(f"{name}: reading it needs fsspec: pip install 'sd-mecha[{extra}]'") from error
    try:
        system, path = url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        how = f"pip install 'sd-mecha[{extra}]'" if scheme in _EXTRAS else str(error)
        raise MechaError(
            f"{name}: reading {scheme}:// addresses needs a library that is not installed: {how}"
        ) from error
    except Exception as error:  # every file system checks its addresses in its own way
        said = str(error).replace(address, name)
        raise MechaError(f"{name}: cannot be read as an address: {said}; check it") from error
    if scheme == "hf":
        from sd_mecha.storage.remote.hub import PinnedHub  # it needs a library that is an extra

        system = PinnedHub(**system.storage_options, skip_instance_cache=True)
    return system, str(path)
