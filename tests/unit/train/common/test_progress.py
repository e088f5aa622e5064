"""Bars and notes share a terminal: what it shows, and what goes where there is none."""

import io
import os
import pty
import re
import sys
import threading
from contextlib import nullcontext

import pytest
from rich.console import Console

from train.common import progress
from train.common.progress import bar, clock, note, waiting

WIDTH = 60


class Screen(io.StringIO):
    """What a terminal of `WIDTH` columns shows of what is written to it."""

    def lines(self) -> list[str]:
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", self.getvalue()):
            if part == "\n":
                row, column = row + 1, 0
            elif part == "\r":
                column = 0
            elif part.startswith("\x1b["):
                row -= int(part[2:-1] or 1) if part.endswith("A") else 0
                if part == "\x1b[2K":
                    rows[row] = ""
            else:
                if column == WIDTH:
                    row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1 :]
                column += 1
            rows += [""] * (row + 1 - len(rows))
        return [line.rstrip() for line in rows if line.strip()]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    shown = Screen()
    console = Console(file=shown, force_terminal=True, width=WIDTH, legacy_windows=False)
    monkeypatch.setattr(progress, "console", console)
    return shown


def redraw() -> None:
    assert progress._display is not None
    progress._display.refresh()


def test_a_note_is_a_line_of_its_own_and_the_bar_is_drawn_below_it(screen: Screen) -> None:
    with bar("reading") as show:
        show(1, 4)
        redraw()
        note("document 7 is empty [bold] :smile:")
        show(2, 4)
        redraw()
        first, second = screen.lines()
        assert first == "document 7 is empty [bold] :smile:"
        assert re.fullmatch(r"reading ━+.* +50% ETA [-\d:]+", second)
    assert screen.lines() == ["document 7 is empty [bold] :smile:"]


def test_a_long_note_is_not_broken_into_lines(screen: Screen) -> None:
    """A path that is cut in two cannot be copied; the terminal goes on in its next row itself."""
    text = "skipped /" + "/".join(f"folder{number}" for number in range(20)) + "/a b.txt"
    with bar("reading") as show:
        show(1, 4)
        redraw()
        note(text)
        redraw()
        *rows, last = screen.lines()
        assert "".join(rows) == text
        assert last.startswith("reading ")
    assert text in screen.getvalue()


def test_a_bar_within_a_bar_is_a_row_below_it(screen: Screen) -> None:
    with bar("outer") as outer:
        outer(1, 2)
        with bar("inner", of_bytes=True) as inner:
            inner(1_500_000, 3_000_000)
            redraw()
            note("noted")
            redraw()
            assert [line.split()[0] for line in screen.lines()] == ["noted", "outer", "inner"]
            assert "1.5 MB of 3.0 MB" in screen.lines()[2]
        redraw()
        assert [line.split()[0] for line in screen.lines()] == ["noted", "outer"]
    assert screen.lines() == ["noted"]
    with bar("later") as show:
        show(3, 4, "three")
        redraw()
        assert [line.split()[0] for line in screen.lines()] == ["noted", "later"]
        assert "three ETA" in screen.lines()[1]


def test_a_bar_that_is_kept_stays_as_it_was_last(screen: Screen) -> None:
    with bar("post", keep=True) as show:
        show(7, 10, "7/10 loss 2.0")
        note("saved")
    saved, kept = screen.lines()
    assert saved == "saved"
    assert kept.startswith("post ")
    assert "7/10 loss 2.0 ETA" in kept


def test_an_error_ends_the_bar(screen: Screen) -> None:
    def work() -> None:
        with bar("reading") as show:
            show(1, 4)
            raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        work()
    assert screen.lines() == []
    assert progress._display is None


def test_what_is_printed_into_a_file_is_not_diverted_to_the_terminal(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("reading") as show:
        show(1, 4)
        print("table")
    assert capsys.readouterr().out == "table\n"
    assert "table" not in screen.getvalue()


def test_on_a_pseudo_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    master, slave = pty.openpty()
    sent: list[bytes] = []

    def read() -> None:
        while not b"".join(sent).endswith(b"the end\r\n"):
            sent.append(os.read(master, 4096))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(slave, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr(progress, "console", Console(stderr=True))
        with bar("reading") as show:
            for done in range(1, 4):
                show(done, 4)
                redraw()
                note(f"note {done}")
        note("the end")
        reader.join(30)
    os.close(master)
    screen = Screen()
    screen.write(b"".join(sent).decode())
    assert screen.lines() == ["note 1", "note 2", "note 3", "the end"]
    assert "reading" in screen.getvalue()


def test_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("reading") as show:
        show(1, 4)
        note("noted " + "x" * 200)
    assert capsys.readouterr().err == "noted " + "x" * 200 + "\n"


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("reading", lines=4, first=50) as show:
        for done in range(51, 101):
            show(done, 100)
    said = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert [words[1] for words in said] == ["51%", "75%", "100%"]
    assert all(words[2] == "ETA" for words in said)
    assert said[-1][3] == "0:00"


def test_a_line_every_half_minute_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while nothing moves, and with nothing to count."""
    now, calls = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_repeated", lambda call: calls.append(call) or nullcontext())

    def at(seconds: float) -> list[str]:
        now[0] = 100 + seconds
        for call in calls:
            call()
        return capsys.readouterr().err.splitlines()

    with bar("searching") as show, waiting("reading text"):
        assert at(29) == []
        assert at(31) == ["searching, 0:31 so far", "reading text, 0:31 so far"]
        show(1, 4)
        assert at(40) == []
        assert at(61) == ["searching 25% ETA 3:03", "reading text, 1:01 so far"]
        assert at(92)[0] == "searching 25% ETA 4:36"


def test_what_is_repeated_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.004)
    called = threading.Event()
    before = threading.active_count()
    with progress._repeated(called.set):
        assert called.wait(20)
    assert threading.active_count() == before


def test_a_bar_that_is_not_shown(screen: Screen) -> None:
    with bar("reading", lines=4, shown=False) as show:
        show(1, 4)
    assert screen.getvalue() == ""


def test_clock() -> None:
    assert (clock(7), clock(187.4), clock(7387)) == ("0:07", "3:07", "2:03:07")
