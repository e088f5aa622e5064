"""Spans: the search against every combination, the published rule, and what is refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from math import inf, nan

import pytest
import torch

from sa_models.errors import PostshareError
from sa_models.search.spans import (
    MeasuredSpans,
    SpanChoice,
    best_spans,
    candidate_spans,
    isotropy_score,
    late_spans,
    most_followers,
)


def brute_candidates(layers: int, most: int, skip: tuple[int, ...]) -> list[SpanChoice]:
    spans = []
    for first, last in itertools.combinations(range(layers), 2):
        inside = range(first, last + 1)
        if last - first <= most and not set(inside) & set(skip):
            spans.append(SpanChoice(first, tuple(inside[1:])))
    return spans


def brute_combinations(layers: int, most: int, skip: tuple[int, ...]) -> list[list[SpanChoice]]:
    """Every set of spans of which no two have a layer in common, by leader."""
    found: list[list[SpanChoice]] = [[]]
    for span in brute_candidates(layers, most, skip):
        found += [
            [*spans, span]
            for spans in found
            if not {layer for s in spans for layer in (s.leader, *s.followers)}
            & {span.leader, *span.followers}
        ]
    return [sorted(spans) for spans in found]


def count(spans: list[SpanChoice]) -> int:
    return sum(len(span.followers) for span in spans)


def latest(spans: list[SpanChoice]) -> list[int]:
    return sorted((layer for span in spans for layer in span.followers), reverse=True)


def random_case(seed: int) -> tuple[int, int, tuple[int, ...], random.Random]:
    draw = random.Random(seed)
    layers, most = draw.randint(1, 8), draw.randint(1, 4)
    skip = tuple(layer for layer in range(layers) if draw.random() < 0.15)
    return layers, most, skip, draw


def test_candidates_of_five_layers() -> None:
    assert candidate_spans(5, 2) == [
        (0, (1,)),
        (0, (1, 2)),
        (1, (2,)),
        (1, (2, 3)),
        (2, (3,)),
        (2, (3, 4)),
        (3, (4,)),
    ]
    assert candidate_spans(5, 9, skip_layers=[2, 2]) == [(0, (1,)), (3, (4,))]
    assert candidate_spans(3, 2, skip_layers=[1]) == []


@pytest.mark.parametrize("seed", range(60))
def test_best_spans_are_those_of_every_combination(seed: int) -> None:
    """Scores of a few eighths, so that ties are frequent: the documented one must win."""
    layers, most, skip, draw = random_case(seed)
    candidates = candidate_spans(layers, most, skip)
    assert sorted(candidates) == sorted(brute_candidates(layers, most, skip))
    every = brute_combinations(layers, most, skip)
    largest = max(map(count, every))
    assert most_followers(layers, most, skip) == largest
    scores = {span: draw.randint(-8, 8) / 8 for span in candidates}
    for followers in range(1, largest + 1):
        expected = max(
            (spans for spans in every if count(spans) == followers),
            key=lambda spans: (sum(scores[span] for span in spans), latest(spans)),
        )
        assert best_spans(scores, layers, followers, most, skip) == expected
        assert best_spans(lambda *span: scores[span], layers, followers, most, skip) == expected


def test_equal_sums_do_not_depend_on_rounding() -> None:
    """In floats 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1; as a sum they tie: later wins."""
    values = {0: 0.1, 2: 0.2, 4: 0.3} | {1: 0.3, 3: 0.2, 5: 0.1}
    assert values[0] + values[2] + values[4] > values[1] + values[3] + values[5]
    spans = best_spans(lambda leader, _: values[leader], 7, 3, 1)
    assert spans == [(1, (2,)), (3, (4,)), (5, (6,))]


def test_greedy_is_not_enough() -> None:
    """The best single span stands in the way of the best two."""
    scores = {SpanChoice(0, (1,)): 0.7, SpanChoice(1, (2,)): 1.0, SpanChoice(2, (3,)): 0.7}
    assert best_spans(scores, 4, 1, 1) == [(1, (2,))]
    assert best_spans(scores, 4, 2, 1) == [(0, (1,)), (2, (3,))]


def test_isotropy_score_is_the_sum_over_followers_with_the_leader() -> None:
    isotropy = torch.eye(4, dtype=torch.float64)
    isotropy[1, 2] = isotropy[2, 1] = 0.5
    isotropy[1, 3] = isotropy[3, 1] = 0.25
    isotropy[2, 3] = isotropy[3, 2] = 0.625
    score = isotropy_score(isotropy)
    assert score(1, (2, 3)) == 0.75
    assert score(2, (3,)) == 0.625
    assert best_spans(score, 4, 1, 3) == [(2, (3,))]
    assert best_spans(score, 4, 2, 3) == [(1, (2, 3))]


def test_late_spans_of_the_published_model() -> None:
    assert late_spans(32, 4, 4) == [(26, (27, 28, 29, 30))]
    assert late_spans(32, 8, 4) == [(21, (22, 23, 24, 25)), (26, (27, 28, 29, 30))]
    assert late_spans(32, 6, 4) == [(23, (24, 25)), (26, (27, 28, 29, 30))]


def test_late_spans_go_round_skipped_layers() -> None:
    # 6 stands alone between 5 and the last layer: it can follow nothing.
    assert late_spans(8, 2, 4, skip_layers=[5]) == [(2, (3, 4))]
    assert late_spans(9, 3, 4, skip_layers=[5, 8]) == [(2, (3, 4)), (6, (7,))]


@pytest.mark.parametrize("seed", range(60))
def test_late_spans_meet_every_budget_that_can_be_met(seed: int) -> None:
    layers, most, skip, _ = random_case(seed)
    alone = {*skip, layers - 1}
    largest = most_followers(layers, most, sorted(alone))
    candidates = candidate_spans(layers, most, sorted(alone))
    for followers in range(1, largest + 1):
        spans = late_spans(layers, followers, most, skip)
        assert count(spans) == followers
        assert set(spans) <= set(candidates)
        members = [layer for span in spans for layer in (span.leader, *span.followers)]
        assert members == sorted(set(members))
    with pytest.raises(PostshareError):
        late_spans(layers, largest + 1, most, skip)


def test_a_budget_that_cannot_be_met_names_the_largest() -> None:
    with pytest.raises(PostshareError, match=r"have 7 followers, 1 to 6 are possible \(8 layers"):
        best_spans(lambda *_: 0.0, 8, 7, 4)
    with pytest.raises(PostshareError, match=r"1 to 5 are possible \(8 layers, \[7\] left alone"):
        late_spans(8, 6, 4)
    with pytest.raises(PostshareError, match="have 0 followers, 1 to 6"):
        best_spans(lambda *_: 0.0, 8, 0, 4)
    with pytest.raises(PostshareError, match=r"none is possible .*; leave fewer layers alone"):
        best_spans(lambda *_: 0.0, 3, 1, 4, skip_layers=[1])


def test_errors_are_one_line_with_cause_and_cure() -> None:
    with pytest.raises(PostshareError, match="at most 0 followers; allow at least 1"):
        candidate_spans(8, 0)
    with pytest.raises(PostshareError, match="skip layer 8; the model has layers 0 to 7"):
        candidate_spans(8, 1, skip_layers=[8])
    with pytest.raises(PostshareError, match=r"score of span 0 -> \[1\] is nan"):
        best_spans(lambda *_: nan, 4, 1, 1)
    with pytest.raises(PostshareError, match=r"score of span 1 -> \[2\] is missing"):
        best_spans({SpanChoice(0, (1,)): 1.0}, 3, 1, 1)


def growing_rises(draw: random.Random, layers: int) -> Callable[[int, tuple[int, ...]], float]:
    """Rises of spans that grow with the followers and with their distance."""
    alone = [draw.random() for _ in range(layers)]
    return lambda leader, followers: sum(alone[f] * (1 + 0.3 * (f - leader - 1)) for f in followers)


@pytest.mark.parametrize("seed", range(20))
def test_spans_that_cannot_be_among_the_best_are_not_measured(seed: int) -> None:
    """Rises that grow with the followers and with their distance: the best of all, from fewer."""
    draw = random.Random(seed)
    layers, most, skip = 12, 4, (0,)
    rise = growing_rises(draw, layers)

    def loss(leader: int, followers: tuple[int, ...]) -> float:
        return 2.0 + rise(leader, followers)

    everything = {span: 2.0 - loss(*span) for span in candidate_spans(layers, most, skip)}
    for followers in (1, 3, 6):
        reports: list[tuple[int, int]] = []
        spans = MeasuredSpans(loss, 2.0, layers, most, skip, lambda *at, to=reports: to.append(at))
        assert spans.best(followers) == best_spans(everything, layers, followers, most, skip)
        assert spans.scores.items() <= everything.items()
        assert reports == [(n + 1, len(everything)) for n in range(len(spans.scores))]
        if followers <= 3:
            assert len(spans.scores) < 0.7 * len(everything)
        before = dict(spans.scores)
        assert spans.best(followers) == best_spans(everything, layers, followers, most, skip)
        assert spans.scores == before


@pytest.mark.parametrize("seed", range(20))
def test_a_part_of_the_text_spares_measurements(seed: int) -> None:
    """It says what a span costs within a factor of two: the best of all, from fewer."""
    draw = random.Random(seed)
    layers, most, skip = 20, 3, (4,)
    rise = growing_rises(draw, layers)

    factors = {span: draw.uniform(0.5, 1.99) for span in candidate_spans(layers, most, skip)}
    asked: list[SpanChoice] = []

    def on_part(leader: int, followers: tuple[int, ...]) -> float:
        span = SpanChoice(leader, followers)
        asked.append(span)
        return 1.5 + rise(*span) * factors[span]

    everything = {span: -rise(*span) for span in factors}
    for followers in (1, 2, 5):
        asked.clear()
        limits = layers, most, skip
        told: list[tuple[int, int]] = []

        def tell(done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            told.append((done, total))

        spans = MeasuredSpans(lambda *at: rise(*at) + 2.0, 2.0, *limits, tell, (on_part, 1.5))
        without = MeasuredSpans(lambda *at: rise(*at) + 2.0, 2.0, *limits)
        best = best_spans(everything, layers, followers, most, skip)
        assert spans.best(followers) == without.best(followers) == best
        assert len(asked) == len(set(asked))
        assert len(told) == len(asked) + len(spans.scores)  # each measurement moves the bar
        assert told[-1] == (len(set(asked)), len(factors))
        assert set(spans.scores) <= set(asked)
        assert {s for s in factors if len(s.followers) == 1} <= set(asked)
        if followers == 1:
            assert len(spans.scores) < 0.5 * len(without.scores)
        for span, score in spans.scores.items():
            assert score == pytest.approx(everything[span], abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_spans_that_cost_too_much_are_given_up(seed: int) -> None:
    """Where the true sum of rises reaches the limit, and never below it; from fewer measurements
    than the best take."""
    draw = random.Random(seed)
    layers, most = 12, 4
    rise = growing_rises(draw, layers)

    def loss(leader: int, followers: tuple[int, ...]) -> float:
        return 2.0 + rise(leader, followers)

    def measured(limit: float) -> tuple[list[SpanChoice] | None, int]:
        spans = MeasuredSpans(loss, 2.0, layers, most)
        return spans.best_below(6, limit), len(spans.scores)

    best, needed = measured(inf)
    assert best is not None
    least = sum(loss(*span) - 2.0 for span in best)
    assert measured(least + 1e-9) == (best, needed)
    assert measured(least - 1e-9)[0] is None
    given_up, few = measured(least / 2)
    assert given_up is None
    assert layers - 1 <= few < needed  # every span of one follower


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(PostshareError, match=r"loss is inf with span 0 -> \[1\] and 2.0 without"):
        MeasuredSpans(lambda *_: inf, 2.0, 2, 1).best(1)
