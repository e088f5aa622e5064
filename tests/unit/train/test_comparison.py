from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from train.comparison import Entry, as_json, interval, pareto, table, verdict
from train.comparison_picture import save_picture
from train.evaluate import BlockLosses


def losses(nats: np.ndarray, tokens: int = 100) -> BlockLosses:
    return BlockLosses(tuple(nats.tolist()), (tokens,) * len(nats))


def entry(name: str, *runs: np.ndarray, size: int | None = 10**6) -> Entry:
    return Entry(name, "", tuple(map(losses, runs)), 1, size)


DRAW = np.random.default_rng(1)
TEXT = 300 + 40 * DRAW.standard_normal(400)
"""Sums of the token losses of 400 blocks of 100 tokens: 3 nats a token, blocks unlike."""


def test_perplexity_is_the_geometric_mean_of_the_seeds() -> None:
    one, other = losses(TEXT), losses(TEXT * 1.1)
    both = Entry("both", "", (one, other), 1, None)
    product = one.perplexity.perplexity * other.perplexity.perplexity
    assert both.perplexity == pytest.approx(math.sqrt(product), rel=1e-12)


def test_interval_of_one_seed_is_that_of_the_mean_of_its_blocks() -> None:
    low, high = interval(entry("a", TEXT))
    middle, half = (low + high) / 2, (high - low) / 2
    expected = 1.96 * TEXT.std() / 100 / math.sqrt(len(TEXT))
    assert middle == pytest.approx(TEXT.mean() / 100, abs=0.1 * expected)
    assert half == pytest.approx(expected, rel=0.1)


def test_a_difference_is_judged_by_its_own_spread() -> None:
    """Blocks are unlike by 13 %, the two models by 1 % on every block."""
    worse = entry("b", TEXT * 1.01 + 0.5 * DRAW.standard_normal(len(TEXT)))
    low, high = interval(worse, entry("a", TEXT))
    difference = (np.array(worse.losses[0].nats) - TEXT) / 100
    expected = 1.96 * difference.std() / math.sqrt(len(TEXT))
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.1 * expected)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert expected < 0.001, "either model's own interval is 0.04 wide"
    assert interval(entry("a", TEXT), entry("a", TEXT)) == (0.0, 0.0)


def test_seeds_widen_the_interval_and_are_paired() -> None:
    shift = np.array([-6.0, 0.0, 6.0])  # of the loss of three seeds, in nats a block
    runs = [TEXT + one for one in shift]
    alone = interval(entry("a", *runs), entry("base", TEXT))
    # Means of three draws from -0.06, 0, 0.06 nats a token: all three alike with 1 in 27.
    assert alone == pytest.approx((-0.06, 0.06), abs=1e-6)
    paired = interval(entry("a", *runs), entry("b", *[run - 2 for run in runs]))
    assert paired == pytest.approx((0.02, 0.02), abs=1e-9)


def test_pareto_front() -> None:
    points = np.array([[3.0, 1.0], [1.0, 4.0], [2.0, 5.0], [2.0, 2.0], [4.0, 1.0]])
    assert pareto(points) == [1, 3, 0]


def test_verdict_says_when_methods_cannot_be_told_apart(tmp_path: Path) -> None:
    noise = 5 * DRAW.standard_normal((2, len(TEXT)))
    rows = [
        entry("continued", TEXT, size=4 * 10**6),
        entry("recipe", TEXT + noise[0] + 3),
        entry("pruned", TEXT + noise[1] + 3),
        entry("pooled", TEXT + 30, size=2 * 10**6),
    ]
    assert "cannot be told apart" in verdict(rows, "recipe", ["pruned", "pooled"])
    assert "better than pooled" in verdict(rows, "recipe", ["pooled"])
    assert "worse than pruned" in verdict(rows, "pooled", ["pruned"])
    value = as_json(rows, "continued")
    assert value[3]["above_reference"] == pytest.approx(0.3, abs=1e-9)
    shown = table(rows, "continued")
    assert shown.row_count == 4
    save_picture(rows, "continued", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
