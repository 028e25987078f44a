"""Symbolic links that lead nowhere, so that a message says more than that there is no file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_IN_A_CIRCLE = 1921  # what Windows says of such a link


def broken_link(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with the link at a path, or with that of a folder on the way to it; None if nothing is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.symlink("gone", os.path.join(folder, "link"))
    ...     print(broken_link(os.path.join(folder, "link")))
    '/.../link' is a link that leads nowhere, to 'gone'
    """
    path = Path(os.path.abspath(path))
    for place in (*reversed(path.parents), path):
        if not os.path.islink(place):
            continue
        try:
            os.stat(place)
        except OSError as error:
            if error.errno == errno.ELOOP or getattr(error, "winerror", None) == _IN_A_CIRCLE:
                return f"{str(place)!r} is a link in a circle"
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                return f"{str(place)!r} is a link that leads nowhere, to {os.readlink(place)!r}"
            return None  # it leads to what may not be looked at
    return None
