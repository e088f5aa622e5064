"""The result of the matrix as a table, below pytest's own."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table

from tests.matrix.cells import CELLS
from tests.matrix.compare import BF16, FP32, Outcome

Outcomes = dict[tuple[str, int], Outcome]
KEY = pytest.StashKey[Outcomes]()


@pytest.fixture(scope="session")
def outcomes(pytestconfig: pytest.Config) -> Outcomes:
    return pytestconfig.stash.setdefault(KEY, {})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cells", nargs="+", metavar="PART", help="those whose names have a part")


@pytest.fixture(scope="session")
def cells(pytestconfig: pytest.Config) -> list[str]:
    """Names of all cells, or of those that `--cells` asks for."""
    parts: list[str] | None = pytestconfig.getoption("--cells")
    found = [name for name in CELLS if parts is None or any(part in name for part in parts)]
    if not found:
        pytest.exit(f"--cells: no cell has {' or '.join(parts or [])} in its name", 4)
    return found


def pytest_terminal_summary(config: pytest.Config) -> None:
    found = config.stash.get(KEY, {})
    if not found:
        return
    table = Table(title="Against one process: largest relative difference (bf16 cells in brackets)")
    for heading in ("backend", "processes", "cells", "refused"):
        table.add_column(heading)
    for quantity in FP32:
        table.add_column(f"{quantity}\n<= {FP32[quantity]:g} ({BF16[quantity]:g})")
    for (backend, processes), outcome in found.items():
        total = len(outcome.passed) + len(outcome.failed)
        table.add_row(
            backend,
            str(processes),
            f"{len(outcome.passed)} of {total}",
            str(len(outcome.refused) or ""),
            *(f"{outcome.worst.get(q, 0):.1e} ({outcome.bf16.get(q, 0):.1e})" for q in FP32),
        )
    Console(width=150).print(table)
