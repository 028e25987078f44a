"""What is to begin anew in a forked process.

A child has copies of the locks, which threads that it lacks may hold, and shares temporary files and connections with
its parent.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewable(Protocol):
    """Something that a child cannot share with its parent."""

    def renew(self) -> None:
        """Let go of what the parent uses. No other thread runs yet, and no lock may be waited for."""


_things: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renew_in_child(thing: Renewable) -> None:
    """From now on, as long as it lives, it is renewed in every process that is forked off."""
    _things.add(thing)


def _renew() -> None:
    for thing in list(_things):
        thing.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=_renew)
