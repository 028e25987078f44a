"""Addresses of remote files: going up and down in them, and showing them without the secrets they may hold."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

_SECRET = re.compile(
    r"(?i)(^|[-_.])(token|key|keyid|sig|signature|secret|password|passwd|pwd|auth|authorization|credential|credentials"
    r"|policy|session|jwt|apikey|api_key|accesskeyid|awsaccesskeyid)$|^x-(amz|goog)-"
)
"""Names of query parameters whose values are nobody's business."""


def is_web(address: str) -> bool:
    """Whether an address is one of the web."""
    return address.lower().startswith(("http://", "https://"))


def shown(address: str) -> str:
    """The address without user, password and the query parameters that grant access.

    Messages, fingerprints and metadata use this form: they are copied into bug reports and published files.

        >>> shown("https://me:pw@host/a%20b.bin?download=true&X-Amz-Signature=abc#part")
        'https://host/a%20b.bin?download=true'
        >>> shown("simplecache::memory://me:pw@host/x")
        'simplecache::memory://host/x'
    """
    return "::".join(map(_shown, address.split("::")))  # one address may be read through another


def _shown(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:  # it is none, but may hold a password all the same
        scheme, found, rest = address.partition("://")
        return scheme + found + rest.partition("?")[0].rpartition("@")[2]
    fields = [field for field in parts.query.split("&") if not _SECRET.search(unquote(field.partition("=")[0]))]
    return _joined(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="&".join(fields), fragment=""))


def shown_path(path: str) -> str:
    """A path as it is, and an address without its secrets; see `shown`."""
    return shown(path) if "://" in path else path


def below(address: str, names: tuple[str, ...]) -> str:
    """The address of what lies under plain names in a folder; the query stays, for it may grant access.

    >>> below("https://host/a/?download=true", ("b c.bin",))
    'https://host/a/b%20c.bin?download=true'
    """
    parts = urlsplit(address)
    path = parts.path.rstrip("/")
    return _joined(parts._replace(path="/".join([path, *(quote(name) for name in names)]), fragment=""))


def above(address: str) -> str:
    """The address of the folder that something lies in.

    >>> above("https://host/a/b.bin?download=true")
    'https://host/a?download=true'
    """
    parts = urlsplit(address)
    return _joined(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0], fragment=""))


def last_name(address: str) -> str:
    """The last part of the path, in plain text.

    >>> last_name("https://host/a/b%20c.bin?download=true")
    'b c.bin'
    """
    return unquote(urlsplit(address).path.rstrip("/").rpartition("/")[2])


def _joined(parts: SplitResult) -> str:
    return urlunsplit(parts)
