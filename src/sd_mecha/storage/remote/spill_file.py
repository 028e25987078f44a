"""A temporary file of equal slots, for what does not fit in memory."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from typing import BinaryIO

from sd_mecha.storage.capabilities import capabilities

_logger = logging.getLogger("sd_mecha")


class SpillFile:
    """A temporary file without a name, which vanishes with the process.

    It is made when the first slot is written. Where that or a later write fails, it is not used any more until
    it is closed; all methods may be called from any thread.

    Args:
        size: bytes of a slot.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()  # guards the making, and the file position where positional reads are missing
        self.broken = False

    def store(self, slot: int, data: memoryview) -> bool:
        """Write data to a slot; False if there is no room for it."""
        position = slot * self._size
        try:
            file = self._open()
            while data:
                if capabilities.pwrite:
                    count = os.pwrite(file.fileno(), data, position)
                else:
                    with self._lock:
                        file.seek(position)
                        count = file.write(data)
                position += count
                data = data[count:]
        except (OSError, ValueError) as error:
            self._give_up(error)
            return False
        return True

    def load(self, slot: int, start: int, view: memoryview) -> bool:
        """Fill a view from a byte of a slot on; False if that cannot be read."""
        file, position = self._file, slot * self._size + start
        if file is None:
            return False
        try:
            while view:
                if capabilities.preadv:
                    count = os.preadv(file.fileno(), [view], position)
                else:
                    with self._lock:
                        file.seek(position)
                        count = file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    return False
                position += count
                view = view[count:]
        except (OSError, ValueError) as error:
            self._give_up(error)
            return False
        return True

    def close(self) -> None:
        """Give all room back; the next write begins anew."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
        self.broken = False

    def _open(self) -> BinaryIO:
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="sd-mecha-", dir=cache_folder(), buffering=0)  # noqa: SIM115
            return self._file

    def _give_up(self, error: Exception) -> None:
        if not self.broken:
            self.broken = True
            _logger.warning("no room on disk for reading remote files ahead (%s); only memory is used for it", error)


def cache_folder() -> str | None:
    """Where the temporary file goes: what TMPDIR and its like say, else a place that is rarely kept in memory."""
    chosen = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return "/var/tmp" if not chosen and os.access("/var/tmp", os.W_OK) else None
