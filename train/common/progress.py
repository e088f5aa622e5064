"""Progress on stderr: bars with the time that is left, and lines that do not tear them.

All bars that are shown at a time are rows of one live display; a second one on the same terminal
would write over the first. Where stderr is no terminal, as in a job of a cluster, a bar prints a
line every :data:`EVERY` seconds, also while nothing moves.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from train.common.console import plain_console

console = plain_console(stderr=True)
EVERY = 30.0
"""Seconds between the lines of a bar where stderr is no terminal."""
_display: Progress | None = None
"""What is live; None while no bar is shown."""


class Show(Protocol):
    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Show how much is done, and a text in the place of the percentage."""


def note(text: str) -> None:
    """Print a line on stderr, above the bars that are shown."""
    if _display is None:
        print(text, file=sys.stderr, flush=True)
    else:
        console.print(Text(text), soft_wrap=True)


@contextmanager
def bar(
    what: str,
    *,
    of_bytes: bool = False,
    lines: int = 0,
    first: int = 0,
    keep: bool = False,
    shown: bool = True,
) -> Iterator[Show]:
    """A bar for as long as the block runs; call what it gives with (done, total).

    Args:
        of_bytes: done and total are bytes, and shown as such.
        lines: about how many to print at least where stderr is no terminal.
        first: what was done before, by another process.
        keep: leave the bar's last state on the terminal.
        shown: false shows nothing.
    """
    if not shown:
        yield lambda done, total, text="": None
    elif console.is_terminal:
        with _row(what, of_bytes, first, keep) as show:
            yield show
    else:
        lined = _Lines(what, lines, first)
        with _repeated(lined.remind):
            yield lined.show


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Lines that say what is being waited for, where stderr is no terminal and no bar can tell."""
    if console.is_terminal:
        yield
    else:
        with _repeated(_Lines(what).remind):
            yield


@contextmanager
def _repeated(call: Callable[[], None]) -> Iterator[None]:
    """Call it now and then, in a thread, for as long as the block runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(EVERY / 4):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _row(what: str, of_bytes: bool, first: int, keep: bool) -> Iterator[Show]:
    """A row of the live display, which the first one starts and the last one ends."""
    global _display
    if _display is None:
        _display = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a file must not end up here
        )
        _display.start()
    display = _display
    task = display.add_task(what, completed=first, text="")

    def show(done: int, total: int, text: str = "") -> None:
        if not text and of_bytes:
            text = f"{decimal(done)} of {decimal(total)}"
        display.update(task, completed=done, total=total, text=text or share(done, total))

    try:
        yield show
    finally:
        if keep:
            console.print(display.make_tasks_table([t for t in display.tasks if t.id == task]))
        display.remove_task(task)
        if not display.tasks:
            display.stop()
            _display = None


class _Lines:
    """The lines of one bar.

    Args:
        lines: about how many to print whatever the time.
        first: what was done before.
    """

    def __init__(self, what: str, lines: int = 0, first: int = 0) -> None:
        self.what, self.lines, self.first = what, lines, first
        self.done, self.total, self.text = first, 0, ""
        self.started = self.said = time.monotonic()

    def show(self, done: int, total: int, text: str = "") -> None:
        before, self.done, self.total, self.text = self.done, done, total, text
        every = max(1, total // max(1, self.lines))
        due = done // every > before // every or done in (self.first + 1, total)
        if self.lines and due and done > before:
            self._say()

    def remind(self) -> None:
        """Say how far it is, where nothing was said for a while."""
        if time.monotonic() - self.said >= EVERY:
            self._say()

    def _say(self) -> None:
        self.said = time.monotonic()
        took, done, total = self.said - self.started, self.done, self.total
        if done == self.first:
            note(f"{self.what}, {clock(took)} so far")
        else:
            left = took / (done - self.first) * (total - done)
            note(f"{self.what} {self.text or share(done, total)} ETA {clock(left)}")


def share(done: int, total: int) -> str:
    return f"{done / max(total, 1):.0%}"


def clock(seconds: float) -> str:
    """`3:07`, or `2:03:07`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
