"""What this platform's file system calls can do, in one object that tests switch off piece by piece."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class Capabilities:
    """Each flag chooses between a system call and the portable code that replaces it."""

    preadv: bool = hasattr(os, "preadv")  # read at an offset, into a buffer; else seek + read under a lock
    pwrite: bool = hasattr(os, "pwrite")  # write at an offset; else seek + write under a lock
    fallocate: bool = hasattr(os, "posix_fallocate")  # reserve disk space; else compare with the free space
    fdatasync: bool = hasattr(os, "fdatasync")  # sync while writing; else only at the end
    fsync_directory: bool = os.name != "nt"  # Windows cannot open a directory


capabilities = Capabilities()
