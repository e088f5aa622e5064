from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from train.commands.compare.plot import save_picture
from train.commands.compare.results import Entry, as_json, table, verdict
from train.common.pareto import pareto
from train.evaluation.perplexity import BlockLosses


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
