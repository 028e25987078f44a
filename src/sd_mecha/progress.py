"""The progress bar of a merge: bytes, rate, time left and the tensor just finished.

`merge(tqdm=...)` takes any class with the small part of tqdm's interface that is used here, so `tqdm.tqdm`
itself, a notebook's bar or a user interface's own class fit as well:

    bar = cls(total=number_of_keys, desc="Merging")     used as a context manager
    bar.set_postfix(total_bytes=...)                    once, before the first key
    bar.update()                                        once per finished key
    bar.set_postfix(key=..., bytes=...)                 its name and the output bytes finished so far

A bar never decides anything: where bytes are not told, it counts keys.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sd_mecha.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress, Task
    from rich.text import Text

PATIENCE = 0.3
"""Seconds before anything is drawn: a merge that takes milliseconds shows no bar and does not pay for one."""

KEY_WIDTH = 44


class NoProgress:
    """Shows nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """Count n finished keys."""

    def set_postfix(self, *_: object, **__: object) -> None:
        """Take note of facts about the merge."""

    def close(self) -> None:
        """End the bar."""


class RichProgress:
    """A bar on standard error, drawn only if that is a terminal and the merge outlasts `PATIENCE`.

    Args:
        total: number of keys to finish, if known.
        desc: what is being done.
        disable: draw nothing; None draws on a terminal only.

    All methods may be called from any thread.
    """

    def __init__(
        self, *, total: int | None = None, desc: str | None = None, disable: bool | None = None, **_: Any
    ) -> None:
        self.total = total
        self.desc = desc or "Merging"
        self.keys = 0
        self.bytes: int | None = None
        self.total_bytes: int | None = None
        self.key = ""
        self._disable = not sys.stderr.isatty() if disable is None else disable
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._timer: threading.Timer | None = None
        self._started = time.monotonic()

    def __enter__(self) -> RichProgress:
        self._started = time.monotonic()
        if not self._disable:
            self._timer = threading.Timer(PATIENCE, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count n finished keys."""
        with self._lock:
            self.keys += n
        self._redraw()

    def set_postfix(self, ordered: object = None, refresh: bool = True, **facts: Any) -> None:
        """Take note of `key`, `bytes` and `total_bytes`; other facts are ignored."""
        with self._lock:
            if "total_bytes" in facts:
                self.total_bytes = facts["total_bytes"]
            if "bytes" in facts:  # workers may report out of turn
                self.bytes = max(self.bytes or 0, facts["bytes"])
            self.key = str(facts.get("key", self.key))
        self._redraw()

    def close(self) -> None:
        """End the bar; what was drawn is removed."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            progress, self._progress, self._disable = self._progress, None, True
        if progress is not None:
            progress.stop()

    def amount(self) -> str:
        """How much is done, of how much, and how fast, in bytes where they are known and else in keys."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        if self.total_bytes is not None:
            done = self.bytes or 0
            return f"{format_size(done)} of {format_size(self.total_bytes)}, {format_size(done / seconds)}/s"
        of_total = "" if self.total is None else f" of {self.total}"
        return f"{self.keys}{of_total} keys"

    def _position(self) -> tuple[int, int | None]:
        return (self.keys, self.total) if self.total_bytes is None else (self.bytes or 0, self.total_bytes)

    def _redraw(self) -> None:
        progress = self._progress
        if progress is not None:
            done, total = self._position()
            progress.update(progress.task_ids[0], completed=done, total=total)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft
        from rich.text import Text

        bar = self

        class Amount(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(bar.amount(), style="progress.download")

        class Key(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(shorten(bar.key, KEY_WIDTH), style="dim")

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            TaskProgressColumn(),
            Amount(),
            TimeLeft(),
            Key(),
        )
        with self._lock:
            if self._disable:  # closed while rich was being imported
                return
            progress = Progress(*columns, console=Console(stderr=True), transient=True)
            done, total = self._position()
            progress.add_task(self.desc, completed=done, total=total)
            progress.start()
            self._progress = progress


def shorten(text: str, width: int) -> str:
    """The text, with its middle left out where it is longer than the width.

    >>> shorten("model.diffusion_model.input_blocks.0.0.weight", 20)
    'model.diff….0.weight'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
