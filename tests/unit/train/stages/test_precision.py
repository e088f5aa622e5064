"""`precision: auto` on ranks that differ; one process: test_start.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.demo_runs import recipe
from train.recipe.recipe import Recipe
from train.stages import precision
from train.stages.precision import settle_precision


def run(folder: Path, others: list[float], is_main: bool = True, **distill: str) -> Any:
    """One of two ranks; `others` is what the other one puts into each reduction, in their order."""
    section = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    more = {"distill": distill} if distill else {}
    theirs = iter(others)
    ranks = SimpleNamespace(
        device=torch.device("cpu"),
        world=2,
        reduce_sum=lambda value: value + next(theirs),
        reduce_max=lambda value: max(value, next(theirs)),
    )

    def on_main(work: Callable[[], object]) -> None:
        if is_main:
            work()

    made = recipe(folder, train={**section, "precision": "auto"}, **more)
    return SimpleNamespace(recipe=made, ranks=ranks, on_main=on_main, folder=folder)


@pytest.mark.parametrize(
    ("here", "there", "becomes", "said"),
    [
        (True, True, "bf16", "all processes have bf16 instructions"),
        (True, False, "fp32", "1 of 2 processes have no bf16 instructions"),
        (False, False, "fp32", "2 of 2 processes have no bf16 instructions"),
    ],
    ids=["all", "mixed", "none"],
)
def test_bf16_is_what_every_rank_has(
    here: bool,
    there: bool,
    becomes: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: here)
    current = run(tmp_path, [0.0 if there else 1.0, 0.0])
    settle_precision(current, trains=True, begun=lambda: None)
    assert current.recipe.train.precision == becomes
    assert capfd.readouterr().err == (f"note: precision auto: train.precision {becomes}, {said}\n")


def test_a_rank_that_does_not_see_the_folder_takes_what_the_main_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)

    def unseen() -> Recipe:
        raise AssertionError("read by a rank that is not the main one")

    # It has bf16; there is a run; it trains in fp32 and its teacher computes in bf16.
    current = run(tmp_path, [0.0, 1.0, 0.0, 1.0], is_main=False, precision="auto")
    settle_precision(current, trains=True, begun=unseen)
    assert current.recipe.train.precision == "fp32"
    assert current.recipe.distill.precision == "bf16"
