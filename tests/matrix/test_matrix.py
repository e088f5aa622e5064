"""The whole equality matrix, `make test-matrix`: every backend on 1, 2 and 4 processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix.cells import BACKENDS, WORLDS
from tests.matrix.compare import Outcome, compare, launch_cells

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def single(cells: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    launch_cells("cpu", 1, cells, folder, timeout=1100)
    return folder


@pytest.mark.timeout(2400)  # the first one also runs the single process
@pytest.mark.parametrize("processes", WORLDS)
@pytest.mark.parametrize("config", BACKENDS)
def test_every_cell_equals_one_process(
    config: str,
    processes: int,
    cells: list[str],
    single: Path,
    tmp_path: Path,
    outcomes: dict[tuple[str, int], Outcome],
) -> None:
    launch_cells(config, processes, cells, tmp_path, timeout=1100)
    outcome = outcomes[config, processes] = compare(tmp_path, single, config)
    assert not outcome.failed
    assert len(outcome.passed) + len(outcome.refused) == len(cells)
