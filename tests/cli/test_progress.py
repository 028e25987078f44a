"""The progress bar takes tqdm's calls, draws only where it is of use, and never fails a merge."""

from __future__ import annotations

import io
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_mecha import progress
from sd_mecha.progress import NoProgress, RichProgress, shorten


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What a terminal on standard error shows. No fixture: pytest replaces the stream once those have run."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    return terminal


def draw(bar: RichProgress) -> None:
    """Have the bar on screen without waiting for its patience to end."""
    assert bar._timer is not None
    bar._timer.cancel()
    bar._show()


def test_bytes_rate_and_key_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with RichProgress(total=4, desc="Merging models") as bar:
        draw(bar)
        bar.set_postfix(total_bytes=2_000_000)
        bar.update()
        bar.set_postfix(key="blocks.1.weight", bytes=500_000)
    text = terminal.getvalue()
    for part in ("Merging models", "25%", "500 kB of 2 MB", "/s", "blocks.1.weight"):
        assert part in text


def test_keys_are_counted_where_bytes_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with RichProgress(total=4) as bar:
        draw(bar)
        bar.update(3)
        assert bar.amount() == "3 of 4 keys"
    assert "75%" in terminal.getvalue()


def test_an_unknown_total_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    with RichProgress() as bar:
        draw(bar)
        bar.update()
        assert bar.amount() == "1 keys"


def test_markup_in_a_key_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with RichProgress(total=1) as bar:
        draw(bar)
        bar.set_postfix(key="[/bold]blocks[0]", unknown=object())
    assert "[/bold]blocks[0]" in terminal.getvalue()


def test_a_short_merge_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with RichProgress(total=1) as bar:
        bar.update()
    assert terminal.getvalue() == ""


def test_nothing_is_drawn_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with RichProgress(total=1) as bar:
        assert bar._timer is None
        bar.update()
    assert capsys.readouterr() == ("", "")


def test_the_bar_comes_by_itself_when_a_merge_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with RichProgress(total=2) as bar:
        assert bar._timer is not None
        bar._timer.join(timeout=10)
        bar.update()
    assert "50%" in terminal.getvalue()


def test_a_closed_bar_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    bar = RichProgress(total=1)
    with bar:
        pass
    bar._show()  # a timer that fired too late
    bar.update()
    assert terminal.getvalue() == ""


def test_workers_may_report_at_once_and_out_of_turn() -> None:
    with RichProgress(total=800, disable=True) as bar:

        def work(start: int) -> None:
            for i in range(100):
                bar.update()
                bar.set_postfix(key=str(i), bytes=start * 100 + i)

        workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert (bar.keys, bar.bytes) == (800, 799)


def test_no_progress_takes_the_same_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with NoProgress(total=3, desc="x") as bar:
        bar.update(2)
        bar.set_postfix(key="k")
        bar.close()
    assert capsys.readouterr() == ("", "")


@given(st.text(), st.integers(3, 50))
def test_shortened_text_fits_and_keeps_both_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    assert len(short) == min(len(text), width)
    assert (short[0], short[-1]) == (text[0], text[-1]) if text else short == ""
