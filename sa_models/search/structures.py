"""The structures that strategy auto tries: spans by what they cost, and every number of KV heads.

Spans are contiguous, as in :mod:`~sa_models.search.spans`: each is measured alone, and dynamic
programming gives those with the smallest sum of rises for 1, 2, 4, ... followers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.search.spans import SpanChoice, best_spans, candidate_spans, most_followers
from sa_models.spans import SHARES, AttentionSpan

MAX_FOLLOWERS = 4
"""Of one leader."""

Spans = Callable[[str, int], list[SpanChoice] | None]
"""Called with what spans share and a number of followers: the best spans with so many; None where
they are not to be tried."""


def span_plan(choices: Iterable[SpanChoice], share: str) -> SharingPlan:
    return SharingPlan(spans=tuple(AttentionSpan(*choice, share) for choice in choices))


def candidates(layers: int, skip_layers: Sequence[int]) -> list[SpanChoice]:
    """The spans that are measured, for each of the shares; skipped layers are in none."""
    return candidate_spans(layers, MAX_FOLLOWERS, skip_layers)


def structures(
    config: Any,
    skip_layers: Sequence[int],
    spans: Spans | None,
    is_met: Callable[[SharingPlan], bool],
) -> list[SharingPlan]:
    """What is tried: for each share 1, 2, 4, ... followers and the first number that meets the
    budget alone, then every smaller number of KV heads.

    Args:
        config: of the base model.
        spans: the best ones; None: there are to be no spans.
        is_met: whether a structure alone meets the budget: of spans their number decides.
    """
    layout = HeadLayout.from_config(config)
    limits = (MAX_FOLLOWERS, skip_layers)
    found: list[SharingPlan] = []
    for share in SHARES if spans is not None else ():
        assert spans is not None
        most = most_followers(layout.layers, *limits)
        numbers = range(1, most + 1)
        some = partial(any_spans, layout.layers, skip_layers)
        enough = next((n for n in numbers if is_met(span_plan(some(share, n), share))), most)
        tried = (n for n in numbers[:enough] if n == enough or not n & (n - 1))  # powers of two
        best = (spans(share, n) for n in tried)
        found += [span_plan(choices, share) for choices in best if choices is not None]
    return found + [
        SharingPlan(kv_heads=n) for n in range(1, layout.kv_heads) if layout.kv_heads % n == 0
    ]


def any_spans(
    layers: int, skip_layers: Sequence[int], share: str, followers: int
) -> list[SpanChoice]:
    """Any spans, where only their number counts."""
    return best_spans(lambda *_: 0.0, layers, followers, MAX_FOLLOWERS, skip_layers)


def changed_layers(structure: SharingPlan, layers: int) -> frozenset[int]:
    """The layers whose attention a structure changes, leaders included."""
    if structure.kv_heads is not None:
        return frozenset(range(layers))
    return frozenset(layer for span in structure.spans for layer in span.layers)


def lowest_changed(structure: SharingPlan) -> int:
    return 0 if structure.kv_heads is not None else min(s.leader for s in structure.spans)


def rise_at(path: Sequence[tuple[int, float]], saved: int) -> float:
    """What it costs to save so much, between the points of a path, and beyond its last in line.

    Args:
        path: (saved, rise), ascending; the first is (0, 0). Of that one alone nothing is known: 0.
    """
    if saved <= 0 or len(path) < 2:
        return 0.0
    edges = list(pairwise(path))
    at = min(bisect_left([right for _, (right, _) in edges], saved), len(edges) - 1)
    (left, low), (right, high) = edges[at]
    return low + (high - low) * (saved - left) / (right - left)


__all__ = ["MAX_FOLLOWERS", "candidates", "changed_layers", "rise_at", "structures"]
