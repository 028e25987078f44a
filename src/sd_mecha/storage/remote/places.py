"""What a remote file must offer: being found, and being fetched by range. `remote_file` makes a file of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sd_mecha.errors import ChangedInputError
from sd_mecha.storage.remote.sinks import Sink

HEAD = 32 * 2**10
"""Bytes that come along when a place is asked what stands there; smaller files need no second question."""


class InterruptedFetch(Exception):
    """Something went wrong that may go well next time.

    Args:
        reason: what, for the message.
        wait: seconds that the server wants us to wait, if it said so.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Found:
    """What stood at an address when it was asked.

    Attributes:
        size: bytes in it.
        marks: what tells its content from another: ETag, version, time; empty where the server says nothing.
        head: the first bytes.
    """

    size: int
    marks: Mapping[str, str]
    head: bytes

    @property
    def identity(self) -> str:
        """Size and marks in one text."""
        return " ".join([str(self.size), *(f"{name}={value}" for name, value in sorted(self.marks.items()))])

    def compare(self, name: str, now: Found) -> None:
        """Compare with what stands there now; a mark that one of both lacks says nothing.

        Raises:
            ChangedInputError: it is something else.
        """
        then = {"size": str(self.size), **self.marks}
        later = {"size": str(now.size), **now.marks}
        changes = [f"{key} was {then[key]}, is {later[key]}" for key in then if later.get(key, then[key]) != then[key]]
        if changes:
            raise ChangedInputError(f"{name}: changed while it was in use ({', '.join(changes)}); merge again")


class Place(Protocol):
    """One address, asked by one protocol. Making one asks nothing; every method may be called from any thread."""

    @property
    def name(self) -> str:
        """The address without secrets."""

    @property
    def basename(self) -> str:
        """The last part of its name."""

    def find(self) -> Found:
        """Ask what stands there.

        Raises:
            ModelNotFoundError, ModelAccessError: no file, or none that can be read by range.
            InterruptedFetch: trying again may help.
        """

    def fetch(self, found: Found, start: int, stop: int, sink: Sink) -> None:
        """Hand bytes of a range to the sink, from its start on; what was handed over before an error is right.

        Raises:
            ChangedInputError: what stands there is not what was found any more.
            ModelAccessError: it cannot be read any more.
            InterruptedFetch: trying again may help.
        """

    def is_folder(self) -> bool:
        """Whether it is known to be a folder."""

    def children(self) -> list[str]:
        """The names in it, as far as the protocol can list them."""

    def below(self, names: tuple[str, ...]) -> Place:
        """The place under plain names within this one."""

    def above(self) -> Place:
        """The place that this one lies in."""

    def opened(self) -> Place:
        """The same place for a file that is going to be read; it may keep connections until it is closed."""

    def close(self) -> None:
        """Let go of connections; fetches that are under way may still end well."""
