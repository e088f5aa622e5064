"""Intervals against a bootstrap, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from train.commands.evaluate.table import short_names, table
from train.evaluation.score import Score, as_json, change, item_hash


def answers(rights: list[int], items: str = "same", **stated: Any) -> Score:
    return Score.of_items("rte", "acc", "mean", rights, [1.0] * len(rights), items, stated)


def nats(sums: Any, tokens: Any, items: str = "same", level: str = "token") -> Score:
    return Score.of_items("perplexity", level, "perplexity", sums, tokens, items, {"level": level})


def test_accuracy_by_hand() -> None:
    """6 of 10 right: lm-eval's standard error is sqrt(p (1 - p) / (n - 1))."""
    score = answers([1] * 6 + [0] * 4)
    error = 1.959963984540054 * math.sqrt(0.6 * 0.4 / 9)
    assert score.value == pytest.approx(0.6)
    assert score.interval == pytest.approx((0.6 - error, 0.6 + error))


def test_paired_accuracy_by_hand() -> None:
    """They differ in 3 of 10 questions, (+1, +1, -1): mean 0.1, variance (3 - 10 x 0.01) / 9."""
    first = answers([1, 1, 0, 0, 1, 1, 1, 1, 0, 0])
    other = answers([1, 1, 1, 1, 0, 1, 1, 1, 0, 0])
    found = change(other, first)
    assert found is not None
    assert found.paired
    error = 1.959963984540054 * math.sqrt((3 - 10 * 0.1**2) / 9 / 10)
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1 - error, 0.1 + error))
    apart = change(answers(list(map(int, other.sums)), "others"), first)
    assert apart is not None
    assert not apart.paired
    both = math.sqrt(2) * 1.959963984540054
    half = both * math.sqrt((0.6 * 0.4 + 0.7 * 0.3) / 2 / 9)
    assert apart.interval == pytest.approx((0.1 - half, 0.1 + half))


def test_perplexity_against_a_bootstrap() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 60, 400).astype(float)
    hard = draw.normal(3, 0.8, 400)  # what both models find hard
    sums = [tokens * (hard + shift + draw.normal(0, 0.1, 400)) for shift in (0, -0.05)]
    first, other = (nats(list(one), list(tokens)) for one in sums)
    found = change(other, first)
    assert found is not None
    assert found.interval is not None
    assert first.interval is not None
    chosen = draw.multinomial(400, np.full(400, 1 / 400), 4000)
    means = [(chosen @ one) / (chosen @ tokens) for one in sums]
    expected = np.quantile(np.expm1(means[1] - means[0]), [0.025, 0.975])
    assert np.log1p(found.interval) == pytest.approx(np.log1p(expected), abs=1.5e-3)
    alone = np.quantile(means[0], [0.025, 0.975])
    assert np.log(first.interval) == pytest.approx(alone, abs=0.02)
    # Pairing matters: the difference is known much better than either side.
    assert np.ptp(np.log1p(found.interval)) < np.ptp(np.log(first.interval)) / 4
    assert first.value == pytest.approx(math.exp(sums[0].sum() / tokens.sum()))


def test_other_tokens_are_compared_by_words_alone() -> None:
    first = nats([30.0, 20.0, 25.0], [10, 8, 9])
    assert change(nats([30.0, 20.0], [12, 9], "other"), first) is None
    words = change(
        nats([33.0, 20.0], [6, 4], "other", "word"),
        nats([30.0, 20.0, 25.0], [6, 4, 5], "x", "word"),
    )
    assert words is not None
    assert words.value == pytest.approx(math.exp(53 / 10 - 75 / 15) - 1)
    assert not words.paired


def test_rounds_are_compared_round_by_round() -> None:
    """The machine slowed down in the third round: of both."""
    first = Score.of_rounds("speed", "decode", [100, 102, 50, 98, 101], {})
    other = Score.of_rounds("speed", "decode", [110, 112.2, 55, 107.8, 111.1], {})
    found = change(other, first)
    assert found is not None
    assert (first.value, first.interval) == (100, (98, 101))
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1, 0.1))


def test_what_is_known_only_as_a_value() -> None:
    first = Score("cola", "mcc", "mean", 0.3, stderr=0.03)
    other = Score("cola", "mcc", "mean", 0.2, stderr=0.04)
    found = change(other, first)
    assert found is not None
    assert found.interval == pytest.approx((-0.1 - 1.96 * 0.05, -0.1 + 1.96 * 0.05), abs=1e-4)
    unknown = Score("cola", "mcc", "mean", 0.2)
    assert unknown.interval is None
    assert change(unknown, first).interval is None  # type: ignore[union-attr]
    single = answers([1])
    assert single.interval is None  # one question says nothing of the spread


def test_a_score_survives_json() -> None:
    for score in (nats([3.0, 4.0], [2, 3]), Score("model", "bytes", "size", 7.0)):
        assert Score.from_dict(json.loads(json.dumps(asdict(score)))) == score
    value = as_json(nats([33.0, 20.0], [6, 4]), nats([30.0, 20.0], [6, 4]))
    assert value["change"]["paired"] is True
    assert value["count"] == 2
    assert "sums" not in value


def test_items_are_told_apart() -> None:
    assert item_hash([1, 23]) != item_hash([12, 3])
    assert item_hash([[1], [2]]) == item_hash([[1], [2]])


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["runs/a/export/compact", "runs/a/export/dense"]) == ["compact", "dense"]
    assert short_names(["runs/a/export/compact", "runs/b/export/compact"]) == [
        "a/export/compact",
        "b/export/compact",
    ]
    assert short_names(["base", "meta-llama/Llama-3.2-1B"]) == ["base", "Llama-3.2-1B"]


def test_the_table_fits_a_terminal() -> None:
    from rich.console import Console

    scores = {"x/base": [answers([1, 0, 1, 1], examples=[0], lm_eval="0")] * 2, "x/post": []}
    scores["x/post"] = [answers([1, 1, 1, 1], examples=[0], lm_eval="0")] * 2
    shown, notes = table(scores, {"dtype": "float32", "device": "here", "cached": 0})
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert "  post     1.0000   +0.2500   -0.2400 to +0.7400" in captured.get()
    assert notes[0] == "rte: lm-eval 0, 4 questions, 0 examples"
