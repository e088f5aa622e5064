"""plan-search.md of a run folder: how its plan was found, in tables too long for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from sa_models.errors import PostshareError
from train.common.run_files import SEARCH_PAGE


def add_to_page(folder: Path, *parts: Table | str) -> None:
    """Append tables and sentences.

    Raises:
        PostshareError: the file cannot be written.
    """
    texts = [markdown(part) if isinstance(part, Table) else part for part in parts]
    file = folder / SEARCH_PAGE
    try:
        with file.open("a", encoding="utf-8") as page:
            page.write("".join(f"{text}\n\n" for text in texts))
    except OSError as error:
        raise PostshareError(f"{file} cannot be written ({error.strerror}); free space") from None


def markdown(table: Table) -> str:
    """A table of the terminal as one of Markdown."""
    columns = [[_text(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    head, *rows = zip(*columns, strict=True)
    rule = ["---" if column.justify == "left" else "---:" for column in table.columns]
    return "\n".join(map(_row, (head, rule, *rows)))


def cost_line(loss: float, base: float, of: str = "") -> str:
    """What a plan costs untrained, in one line of the terminal.

    Args:
        loss, base: with the plan and before it, on calibration text, nats per token.
        of: the part of the plan that it is the cost of, where there are several: `spans: `.
    """
    before, after = math.exp(base), math.exp(loss)
    return (
        f"cost      {of}perplexity {before:.2f} to {after:.2f} on calibration text, untrained: "
        f"{after / before - 1:+.1%}"
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")
