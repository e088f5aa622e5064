"""One training on every backend, against a single process: a part of the matrix in tests/matrix."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.matrix.cells import BACKENDS, CELLS, SUBSET
from tests.matrix.compare import compare, initial_distance, launch_cells
from tests.matrix.worker import run_all

pytestmark = pytest.mark.distributed


# Each is much as another: as DDP, or as ZeRO-3 on two processes.
MORE = [
    *(("ddp", 3), ("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3)),
    *(("zero3-offload-optimizer", 2), ("zero3-offload", 2), ("fsdp2", 2)),
]


@pytest.fixture(scope="module")
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cells of the tests that were asked for, on one process, which is this one."""
    folder = tmp_path_factory.mktemp("single")
    names = set(COMPARED)
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.originalname == EQUAL:
            at = item.callspec.params
            names.update(SUBSET[at["config"], at["processes"]])
    run_all(sorted(names), folder)
    return folder


@pytest.mark.parametrize(
    ("config", "processes"),
    [pytest.param(*at, marks=[pytest.mark.more] * (at in MORE)) for at in SUBSET],
)
def test_cells_equal_one_process(config: str, processes: int, single: Path, tmp_path: Path) -> None:
    cells = SUBSET[config, processes]
    output = launch_cells(config, processes, cells, tmp_path)
    copies = config == "ddp" or config < "zero3"
    assert output.count("divergence found") == (processes if copies and config != "fsdp2" else 0)
    outcome = compare(tmp_path, single, config)
    assert not outcome.failed
    assert sorted(outcome.passed + outcome.refused) == sorted(cells)


EQUAL = test_cells_equal_one_process.__name__
COMPARED = ("ties x4 clipped", "both x4 free", "both x1 clipped")


def test_clipping_and_penalty_matter_in_these_cells(single: Path) -> None:
    """The comparison above would pass for anything if neither did."""
    rows = json.loads((single / "rows.json").read_text())
    for name in rows:
        clip = CELLS[name].clip_norm
        assert clip is None or all(row["norm"] > clip for row in rows[name])
        assert initial_distance(name, single) > 1e-3
    pulled = rows["ties x4 clipped"]
    assert 0 < pulled[-1]["penalty"] < pulled[0]["penalty"]
    assert abs(rows["both x4 free"][-1]["lm"] / rows["both x1 clipped"][-1]["lm"] - 1) > 3e-4


def test_the_subset_meets_every_pair() -> None:
    met = set()
    for (config, _), names in SUBSET.items():
        for name in names:
            cell = CELLS[name]
            facts = (config, cell.model, cell.accumulation, cell.clip_norm is None)
            met |= {(i, j, facts[i], facts[j]) for i, j in itertools.combinations(range(4), 2)}
    values = [BACKENDS, ("ties", "spans", "both"), (1, 4), (True, False)]
    for i, j in itertools.combinations(range(4), 2):
        for pair in itertools.product(values[i], values[j]):
            assert (i, j, *pair) in met
