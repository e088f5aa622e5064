"""Removed units: pruned from the attention of their layer, in all four projections.

The layer then attends with fewer heads: it neither computes nor caches anything for the unit. In
dense weights a removed unit is all zeros, which a stock Llama computes the same with.

A layer of which all units are removed is *dropped*: it has no attention and no norm before it, and
its output is x + MLP(norm(x)), as in LLM-Drop (2406.15786). In dense weights, where the norm feeds
nothing, its gain is all ones: some tools divide by it.

This file imports no torch: it also travels inside compact exports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .errors import PostshareError
from .heads import HeadLayout
from .spans import AttentionSpan
from .ties import HeadTie, Unit, check_range


def check_removed(
    removed: Sequence[Unit],
    ties: Sequence[HeadTie],
    spans: Sequence[AttentionSpan],
    layout: HeadLayout,
) -> None:
    """Check removed units against the model's attention shape, and against ties and spans.

    Raises:
        PostshareError: names the unit and the reason: out of range, named twice, target or source
            of a tie, or in a layer of a span; or no layer would keep any unit.
    """
    for unit in removed:
        check_range(f"removed {list(unit)}: the", unit, layout)
    for unit, count in Counter(removed).items():
        if count > 1:
            raise PostshareError(
                f"removed {list(unit)}: the unit is named {count} times; name each once"
            )
    _check_ties(set(removed), ties)
    span_of = {layer: span for span in spans for layer in span.layers}
    for layer, index in removed:
        if layer in span_of:
            raise PostshareError(
                f"removed {[layer, index]}: layer {layer} is in '{span_of[layer]}', whose layers "
                "keep all their units; remove units of other layers, or take it out of the span"
            )
    if len(dropped_layers(removed, layout)) == layout.layers:
        raise PostshareError(
            f"removed: all {layout.layers} layers would lose all their units, and no token would "
            "see another; keep units of at least one layer"
        )


def dropped_layers(removed: Iterable[Unit], layout: HeadLayout) -> frozenset[int]:
    """The layers of which all units are removed: they have no attention."""
    counts = Counter(layer for layer, _ in removed)
    return frozenset(layer for layer, count in counts.items() if count == layout.units)


def _check_ties(removed: set[Unit], ties: Sequence[HeadTie]) -> None:
    for tie in ties:
        for unit, end in ((tie.target, "target"), (tie.source, "source")):
            if unit in removed:
                raise PostshareError(
                    f"removed {list(unit)}: the unit is the {end} of '{tie}'; a unit is tied or "
                    "removed, keep one of the two"
                )


__all__ = ["check_removed", "dropped_layers"]
