"""SIGKILL of a random rank at random moments; the same command; the weights of an undisturbed run.

`pytest tests/faults/test_kills.py --kills 100`; half of them on one process, half on two.

Fewer than 20 are shared out between one process and DDP.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import killing

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(7200)]

SHARES = {"one": 0.5, "ddp": 0.25, "zero2": 0.25}
BOUNDS = {"one": 0.0, "ddp": 1e-6, "zero2": 1e-6}


@pytest.mark.parametrize("config", SHARES)
def test_nothing_is_lost(
    config: str,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    fault_table: Callable[[killing.Count], None],
) -> None:
    asked = pytestconfig.getoption("--kills")
    if asked < 20 and config == "zero2":
        pytest.skip("few kills: one process and DDP only; --kills 20 for all")
    kills = max(1, round(SHARES[config] * asked)) if asked >= 20 else asked // 2 + (config == "one")
    chance = random.Random(f"{config} {pytestconfig.getoption('--seed')}")
    whole, count = tmp_path / "whole", killing.Count(config)
    killing.undisturbed(config, whole)
    try:
        while count.kills < kills:
            folder = tmp_path / f"run-{count.runs}"
            killing.killed(config, folder, chance, count, kills)
            count.runs += 1
            count.difference = max(count.difference, killing.largest_difference(folder, whole))
            assert count.difference <= BOUNDS[config], killing.log_of(folder)
    finally:
        fault_table(count)
    assert count.kills == kills
