from __future__ import annotations

import statistics

import pytest

from tests.faults.killing import Count

_counts: list[Count] = []


@pytest.fixture
def fault_table() -> list[Count]:
    """Appended to by the tests, printed at the end."""
    return _counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _counts:
        return
    write = terminalreporter.write_line
    write("")
    write(
        "| killed | kills | in training | half-written checkpoint left | runs ended "
        "| largest difference | steps redone, mean (most) | first new step after, median (most) |"
    )
    write("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for c in _counts:
        redone = f"{statistics.mean(c.lost):.1f} ({max(c.lost)})" if c.lost else "-"
        first = (
            f"{statistics.median(c.resumed):.1f} s ({max(c.resumed):.1f} s)" if c.resumed else "-"
        )
        difference = "0, bitwise" if c.difference == 0 else f"{c.difference:.1e}"
        write(
            f"| {c.name} | {c.kills} | {c.training} | {c.writing} | {c.runs} | {difference} "
            f"| {redone} | {first} |"
        )
