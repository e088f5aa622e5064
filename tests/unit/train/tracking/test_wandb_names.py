from __future__ import annotations

import re

import pytest

from tests.support.pages import DOCS
from train.tracking.metrics_log import TIMING_KEYS
from train.tracking.wandb_names import NAMES, wandb_name


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("lm_loss", "train/loss"),
        ("gradient_norm", "train/grad_norm"),
        ("learning_rate", "train/learning_rate"),
        ("tokens", "train/num_tokens"),
        ("validation_loss", "eval/loss"),
        ("penalty", "postshare/penalty"),
        ("pair_distances", "postshare/pair_distances"),
        ("tokens_per_second", "perf/tokens_per_second"),
    ],
)
def test_names(column: str, name: str) -> None:
    assert wandb_name(column) == name


def test_times_and_memory_are_performance() -> None:
    assert {wandb_name(key) for key in TIMING_KEYS} == {f"perf/{key}" for key in TIMING_KEYS}


def test_the_page_has_every_name() -> None:
    page = (DOCS / "tracking.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (`[^|]+) \| (`[^|]+) \|$", page, re.MULTILINE))
    told = {
        column: name
        for left, right in rows.items()
        for column, name in zip(
            re.findall("`([^`]+)`", left), re.findall("`([^`]+)`", right), strict=False
        )
    }
    assert told | NAMES == told
