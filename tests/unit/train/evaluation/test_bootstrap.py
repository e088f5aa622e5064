from __future__ import annotations

import math

import numpy as np
import pytest

from train.evaluation.bootstrap import interval
from train.evaluation.perplexity import BlockLosses

DRAW = np.random.default_rng(1)
TEXT = 300 + 40 * DRAW.standard_normal(400)
"""Sums of the token losses of 400 blocks of 100 tokens: 3 nats a token, blocks unlike."""


def losses(nats: np.ndarray) -> BlockLosses:
    return BlockLosses(tuple(nats.tolist()), (100,) * len(nats))


def test_interval_of_one_seed_is_that_of_the_mean_of_its_blocks() -> None:
    low, high = interval([losses(TEXT)])
    middle, half = (low + high) / 2, (high - low) / 2
    expected = 1.96 * TEXT.std() / 100 / math.sqrt(len(TEXT))
    assert middle == pytest.approx(TEXT.mean() / 100, abs=0.1 * expected)
    assert half == pytest.approx(expected, rel=0.1)


def test_a_difference_is_judged_by_its_own_spread() -> None:
    """Blocks are unlike by 13 %, the two models by 1 % on every block."""
    worse = losses(TEXT * 1.01 + 0.5 * DRAW.standard_normal(len(TEXT)))
    low, high = interval([worse], [losses(TEXT)])
    difference = (np.array(worse.nats) - TEXT) / 100
    expected = 1.96 * difference.std() / math.sqrt(len(TEXT))
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.1 * expected)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert expected < 0.001, "either model's own interval is 0.04 wide"
    assert interval([losses(TEXT)], [losses(TEXT)]) == (0.0, 0.0)


def test_seeds_widen_the_interval_and_are_paired() -> None:
    shift = np.array([-6.0, 0.0, 6.0])  # of the loss of three seeds, in nats a block
    runs = [losses(TEXT + one) for one in shift]
    alone = interval(runs, [losses(TEXT)])
    # Means of three draws from -0.06, 0, 0.06 nats a token: all three alike with 1 in 27.
    assert alone == pytest.approx((-0.06, 0.06), abs=1e-6)
    paired = interval(runs, [losses(TEXT + one - 2) for one in shift])
    assert paired == pytest.approx((0.02, 0.02), abs=1e-9)
