"""Recognising files that are not what their name says, so that the message names what was found."""

from __future__ import annotations

import codecs

HEAD_SIZE = 256
"""How many leading bytes `describe_foreign` wants to see."""

BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"
"""The bytes that a text may begin with and mean nothing by: a byte order mark and white space."""

_STARTS: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer that stands for the model, not the model itself; fetch it with `git lfs pull`",
    ),
    (
        (b"PK\x03\x04", b"PK\x05\x06"),
        "a zip archive; of these, only a PyTorch checkpoint (with data.pkl in it) is a model",
    ),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a Python pickle that torch.save did not write, and was not executed; save its tensors with torch.save instead",
    ),
    (
        (b"Salted__", b"age-encryption.org/", b"-----BEGIN PGP MESSAGE"),
        "an encrypted file; decrypt it first",
    ),
    (
        (b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\xfd7zXZ\x00", b"BZh", b"\x28\xb5\x2f\xfd"),
        "a compressed archive; unpack it first",
    ),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "a picture, such as the preview of a model; fetch the model itself"),
    (b"GGUF", "a GGUF file, which is a format of its own; open it as a model, not as part of another"),
    (b"{", "a JSON text, such as the index of a model in several parts, without tensors in it"),
)
_TAR_MEMBERS = (b"sys_info", b"pickle", b"tensors", b"storages")  # names of the first one, filled up with NULs
_SHORTEST_TEXT = 8  # a few bytes may mean anything
_SHOWN = 40
_HTML_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<body")


def describe_foreign(head: bytes) -> str | None:
    """What a file that starts with these bytes is, and what to do about it; None if that is not known.

    To be asked only after a file has failed as what it claims to be: a valid file may start with anything.
    """
    if not head:
        return "an empty file (0 bytes): a download or copy that did not finish; fetch it again"
    text = head.lstrip(BEFORE_TEXT)
    if text.lower().startswith(_HTML_STARTS):
        return "a web page (HTML): the download link wants a login or has expired; download the model again"
    if head[:100].rstrip(b"\0") in _TAR_MEMBERS and len(head) > 100:
        return (
            "a tar archive as PyTorch before 0.2 wrote, which cannot be read; load it with torch.load and save it again"
        )
    return next((what for start, what in _STARTS if text.startswith(start)), None) or _text(head)


def _text(head: bytes) -> str | None:
    if len(head) < _SHORTEST_TEXT:
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # its last letter may be cut in two
    except UnicodeDecodeError:
        return None
    if not all(letter.isprintable() or letter in "\t\r\n\f" for letter in text):
        return None
    shown = text.strip()[:_SHOWN]
    return f"a text, which begins with {shown!r}; download the model again, or check what it is"
