"""What is printed: names are characters, wherever they come from."""

from __future__ import annotations

import io
import re

from rich.table import Table

from tests.support import REPOSITORY
from train.common.console import plain_console

NAME = "runs/[a] [bold]x[/bold] :smile: [/]"


def test_names_are_printed_as_they_are() -> None:
    out = io.StringIO()
    console = plain_console(file=out, width=200)
    table = Table(NAME)
    table.add_row(NAME)
    console.print(f"in {NAME}")
    console.print(table)
    assert out.getvalue().count(NAME) == 3


def test_there_is_no_other_console() -> None:
    """Rich's own takes `[a]` in a path for markup, and drops it."""
    files = [f for f in (REPOSITORY / "train").rglob("*.py") if f.name != "console.py"]
    assert [f.name for f in files if re.search(r"\bConsole\(", f.read_text())] == []
