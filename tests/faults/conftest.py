from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict

import pytest

from tests.faults.killing import Count

PROPERTY = "faults"


@pytest.fixture
def fault_table(record_property: Callable[[str, object], None]) -> Callable[[Count], None]:
    """Called with what a test has counted, however far it came; printed at the end.

    A property of the report: with `-n` tests run in other processes than the one that prints.
    """
    return lambda count: record_property(PROPERTY, asdict(count))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for key in ("passed", "failed") for r in terminalreporter.getreports(key)]
    found = [value for r in reports for name, value in r.user_properties if name == PROPERTY]
    if not found:
        return
    write = terminalreporter.write_line
    write("")
    write(
        "| killed | kills | in training | half-written checkpoint left | runs ended "
        "| largest difference | steps redone, mean (most) | first new step after, median (most) |"
    )
    write("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for c in (Count(**value) for value in found):
        redone = f"{statistics.mean(c.lost):.1f} ({max(c.lost)})" if c.lost else "-"
        first = (
            f"{statistics.median(c.resumed):.1f} s ({max(c.resumed):.1f} s)" if c.resumed else "-"
        )
        difference = "0, bitwise" if c.difference == 0 else f"{c.difference:.1e}"
        write(
            f"| {c.name} | {c.kills} | {c.training} | {c.writing} | {c.runs} | {difference} "
            f"| {redone} | {first} |"
        )
