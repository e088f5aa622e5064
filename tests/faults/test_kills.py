"""SIGKILL of a random rank at random moments; the same command; the weights of an undisturbed run.

`pytest tests/faults/test_kills.py --kills 100`: so many of the demo recipe, half of them on one
process, half on two, and a 25th part, 4, of each other way of training on each backend it has here.

Fewer than 20 are shared out between one process and DDP, and are of the demo recipe alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import killing

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(7200)]

SHARES = {"one": 0.5, "ddp": 0.25, "zero2": 0.25}
BOUNDS = {"one": 0.0, "ddp": 1e-6, "zero2": 1e-6, "fsdp2": 1e-6}
# What each has of its own must survive: a second stage, a teacher and its cache, moved weights.
OTHER_WAYS = (
    *(("one", way) for way in killing.WAYS if way != "demo"),
    *(("ddp", way) for way in ("heal", "basis", "distill cached", "decoupled", "residual", "lora")),
    *(("zero2", way) for way in ("heal", "distill", "progressive", "residual")),
    *(("fsdp2", way) for way in ("heal", "basis", "residual")),
)
FEW = 20
"""Below this `make test-more` asks, which takes a part of the cases."""

Table = Callable[[killing.Count], None]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("one", marks=pytest.mark.more),
        pytest.param("ddp", marks=pytest.mark.more),
        pytest.param("zero2", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost(
    config: str, tmp_path: Path, pytestconfig: pytest.Config, fault_table: Table
) -> None:
    asked = pytestconfig.getoption("--kills")
    if asked < FEW and config == "zero2":
        pytest.skip("few kills: one process and DDP only; --kills 20 for all")
    few = asked // 2 + (config == "one")
    kills = few if asked < FEW else max(1, round(SHARES[config] * asked))
    survive(config, "demo", kills, tmp_path, pytestconfig, fault_table)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "way"), OTHER_WAYS)
def test_nothing_is_lost_of_other_ways(
    config: str, way: str, tmp_path: Path, pytestconfig: pytest.Config, fault_table: Table
) -> None:
    asked = pytestconfig.getoption("--kills")
    if asked < FEW:
        pytest.skip("few kills: the demo recipe only; --kills 20 for all ways of training")
    survive(config, way, max(1, round(asked / 25)), tmp_path, pytestconfig, fault_table)


def survive(
    config: str, name: str, kills: int, folder: Path, options: pytest.Config, table: Table
) -> None:
    """Kill runs until there were so many kills; each must end with the whole run's weights."""
    way = killing.WAYS[name]
    drawn = config if name == "demo" else f"{config} {name}"
    chance = random.Random(f"{drawn} {options.getoption('--seed')}")
    whole, count = folder / "whole", killing.Count(drawn)
    killing.undisturbed(config, way, whole)
    try:
        while count.kills < kills:
            run = folder / f"run-{count.runs}"
            killing.killed(config, way, run, chance, count, kills)
            count.runs += 1
            difference = killing.largest_difference(run / way.trained, whole / way.trained)
            count.difference = max(count.difference, difference)
            assert count.difference <= BOUNDS[config], killing.log_of(run)
    finally:
        table(count)
    assert count.kills == kills
