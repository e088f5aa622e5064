"""From matches and a budget to a plan (PostShare, arXiv 2402.11819, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan, Unit, resolve_roots

if TYPE_CHECKING:
    from sa_models.scores.weight_cosine import Matches


@dataclass(frozen=True)
class Budget:
    """How much may be tied: a ratio of all heads, or a number of heads. Exactly one is given."""

    ratio: float | None = None
    heads: int | None = None

    def units(self, layout: HeadLayout) -> int:
        """Units to tie: floor(ratio * all units), counted over all layers as published.

        Raises:
            PostshareError: neither or both are given, or a number of heads that would split a
                KV group.
        """
        if (self.ratio is None) == (self.heads is None):
            raise PostshareError("the plan's budget needs either ratio or heads; give exactly one")
        if self.ratio is not None:
            # Through the decimal that the user wrote: 0.29 of 100 units is 29, not floor(28.99...).
            return floor(Fraction(str(self.ratio)) * layout.layers * layout.units)
        assert self.heads is not None
        if self.heads % layout.heads_per_unit:
            nearest = max(1, round(self.heads / layout.heads_per_unit)) * layout.heads_per_unit
            raise PostshareError(
                f"plan.budget.heads {self.heads} splits a KV group of {layout.heads_per_unit} "
                f"heads, which are tied together; the nearest is {nearest}"
            )
        return self.heads // layout.heads_per_unit


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


def units_to_tie(budget: Budget, layout: HeadLayout, skip_layers: Sequence[int] = (0,)) -> int:
    """The number of units that a budget asks for.

    Raises:
        PostshareError: it cannot be met (see :meth:`Budget.units` and :func:`eligible_units`), or
            it ties nothing.
    """
    wanted, units = budget.units(layout), layout.layers * layout.units
    eligible = len(eligible_units(layout, skip_layers))
    if not eligible:
        raise PostshareError(
            f"no unit can be tied: layers {sorted({0, *skip_layers})} are never targets, and the "
            "model has no others; skip fewer layers, or make fewer layers followers"
        )
    if not 1 <= wanted <= eligible:
        raise PostshareError(
            f"plan.budget asks for {wanted} of {units} units, possible are 1 to {eligible} "
            f"(layers {sorted({0, *skip_layers})} are never targets); set plan.budget.ratio "
            f"between {1 / units:.4f} and {eligible / units:.4f}"
        )
    return wanted


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
        count: from :func:`units_to_tie`.
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


def make_plan(
    matches: Matches,
    layout: HeadLayout,
    budget: Budget,
    share: Sequence[str],
    skip_layers: Sequence[int] = (0,),
    released: bool = False,
) -> SharingPlan:
    """A plan from matches and a budget.

    Args:
        released: keep the published selection, chains and all (fewer heads change than asked
            for); otherwise chains are resolved to root sources, and effective = requested.
    """
    count = units_to_tie(budget, layout, skip_layers)
    pairs = select_pairs(matches, layout, count, share, skip_layers)
    return SharingPlan(ties=pairs if released else resolve_roots(pairs), released=released)
