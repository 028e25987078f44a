"""What this platform's file system calls can do, in one object that tests switch off piece by piece."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass
class Capabilities:
    """Each flag chooses between a system call and the portable code that replaces it."""

    preadv: bool = hasattr(os, "preadv")  # read at an offset, into a buffer; else seek + read under a lock
    pwrite: bool = hasattr(os, "pwrite")  # write at an offset; else seek + write under a lock
    fallocate: bool = hasattr(os, "posix_fallocate")  # reserve disk space; else compare with the free space
    fdatasync: bool = hasattr(os, "fdatasync")  # sync while writing; else only at the end
    fsync_directory: bool = os.name != "nt"  # Windows cannot open a directory
    flock: bool = find_spec("fcntl" if os.name != "nt" else "msvcrt") is not None  # lock a file; else trust the others
    rename_open: bool = os.name != "nt"  # rename and remove open files; else close them first
    exchange: bool = sys.platform == "linux"  # let two folders change places at once; else rename one after the other


capabilities = Capabilities()
