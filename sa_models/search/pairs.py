"""Pairs of targets and sources, and the plan they make (PostShare, arXiv 2402.11819, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan, Unit, resolve_roots

if TYPE_CHECKING:
    from sa_models.scores.weight_cosine import Matches


def eligible_units(layout: HeadLayout, skip_layers: Sequence[int] = (0,)) -> list[Unit]:
    """The units that may be targets, in the published order: last layer first, units ascending.

    Layer 0 has no earlier layer, so its units are never targets.

    Raises:
        PostshareError: a layer to skip that the model does not have.
    """
    for layer in skip_layers:
        if not 0 <= layer < layout.layers:
            raise PostshareError(
                f"plan.skip_layers names layer {layer}; the model has layers 0 to "
                f"{layout.layers - 1}"
            )
    return [
        (layer, unit)
        for layer in range(layout.layers - 1, 0, -1)
        if layer not in skip_layers
        for unit in range(layout.units)
    ]


def check_count(
    count: int, layout: HeadLayout, skip_layers: Sequence[int] = (0,), removes: bool = False
) -> None:
    """Refuse a number of units that cannot be tied, or removed.

    Args:
        removes: whether they are removed: every layer then keeps one.

    Raises:
        PostshareError: none, or more than are eligible (see :func:`eligible_units`).
    """
    units, eligible = layout.layers * layout.units, len(eligible_units(layout, skip_layers))
    if removes:
        eligible -= eligible // layout.units
        if not 1 <= count <= eligible:
            raise PostshareError(
                f"plan.budget asks for {count} of {units} units, and {eligible} can be removed "
                f"(every layer keeps one, layers {sorted({0, *skip_layers})} all); ask for fewer, "
                "or drop whole layers with plan.action=drop"
            )
    if not eligible:
        raise PostshareError(
            f"no unit can be tied: layers {sorted({0, *skip_layers})} are never targets, and the "
            "model has no others; skip fewer layers, or make fewer layers followers"
        )
    if not 1 <= count <= eligible:
        raise PostshareError(
            f"plan.budget asks for {count} of {units} units, possible are 1 to {eligible} "
            f"(layers {sorted({0, *skip_layers})} are never targets); give a ratio between "
            f"{math.ceil(10_000 / units) / 10_000:.4f} and {eligible / units:.4f}"
        )


def select_pairs(
    matches: Matches,
    layout: HeadLayout,
    count: int,
    share: Sequence[str],
    skip_layers: Sequence[int] = (0,),
) -> tuple[HeadTie, ...]:
    """The ``count`` targets with the highest scores, each with its best source, as published.

    Chains are left in: a source may itself be a target. The order is ascending score; equal
    scores keep the published order (last layer first, units ascending).

    Args:
        count: see :func:`check_count`.
        skip_layers: layers whose units are never targets. They may be sources.
    """
    candidates = eligible_units(layout, skip_layers)
    scores = {unit: float(matches.scores[unit]) for unit in candidates}
    chosen = sorted(candidates, key=scores.__getitem__)[len(candidates) - count :]
    return tuple(
        HeadTie(
            target=unit,
            source=(int(matches.sources[unit][0]), int(matches.sources[unit][1])),
            projections=tuple(share),
            score=scores[unit],
        )
        for unit in chosen
    )


def select_removals(
    matches: Matches, layout: HeadLayout, count: int, skip_layers: Sequence[int] = (0,)
) -> tuple[Unit, ...]:
    """The ``count`` targets with the highest scores, of which every layer keeps a unit; sorted.

    Raises:
        PostshareError: see :func:`check_count`.
    """
    from sa_models.scores.magnitude import least_important  # whose torch a dry run does without

    check_count(count, layout, skip_layers, removes=True)
    units = eligible_units(layout, skip_layers)
    importance = matches.scores.new_zeros(layout.layers, layout.units)
    for place, tie in enumerate(select_pairs(matches, layout, len(units), (), skip_layers)):
        importance[tie.target] = -place  # in the order of the pairs, also where scores are equal
    return least_important(importance, units, count)


def make_plan(
    matches: Matches,
    layout: HeadLayout,
    count: int,
    share: Sequence[str],
    skip_layers: Sequence[int] = (0,),
    released: bool = False,
) -> SharingPlan:
    """A plan of ``count`` ties from matches.

    Args:
        released: keep the published selection, chains and all (fewer heads change than asked
            for); otherwise chains are resolved to root sources, and effective = requested.

    Raises:
        PostshareError: see :func:`check_count`.
    """
    check_count(count, layout, skip_layers)
    pairs = select_pairs(matches, layout, count, share, skip_layers)
    return SharingPlan(ties=pairs if released else resolve_roots(pairs), released=released)
