"""The penalty's exchange between ranks: same result as one process, and the bytes it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launcher import run

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("exchange_worker.py")


@pytest.mark.parametrize(
    "processes",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4)),
        pytest.param(3, marks=pytest.mark.more),
    ],
)
def test_exchanged_penalty_equals_that_of_one_process(processes: int) -> None:
    output = run("ddp", WORKER, processes=processes, timeout=400)
    assert output.count("72 cells hold") == processes, output
    assert output.count("36 pulls hold") == processes, output
