"""What readers of one file share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from sd_mecha.storage.contract import ByteSource, TensorEntry


class FileReader(ABC):
    """A reader whose tensors all lie in one file.

    Args:
        file: the file, which the reader closes; at once if it cannot be read.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self.name = file.name
        try:
            self._open()
        except BaseException:
            file.close()
            raise

    @abstractmethod
    def _open(self) -> None:
        """Read headers, and set `entries` and `metadata`."""

    @property
    def fingerprint(self) -> str:
        """What tells this file from another that stood in its place earlier or later."""
        return self._file.fingerprint

    def check_unchanged(self) -> None:
        """Raise ChangedInputError if the file is not the one that was opened any more."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
