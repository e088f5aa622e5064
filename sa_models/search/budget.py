"""Budgets in units, parameters, bytes or cache, and what one unit gives towards them.

A share such as ``-10%`` is of the whole model before the plan. Spans and fewer KV heads count:
only what they leave is asked of the units. Every exported parameter takes the same bytes, so that
a share of the bytes is that share of the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Literal

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.savings import PlanSavings

Counted = Literal["units", "parameters", "bytes", "cache"]


def parse_share(text: str) -> Fraction:
    """``-10%`` as 1/10. Raises ValueError for anything but a share below 0 and above -100 %."""
    match = re.fullmatch(r"-(\d+(?:\.\d+)?)\s?%", text.strip())
    if not match or not 0 < Fraction(match[1]) < 100:
        raise ValueError(f"{text!r} is no share to save; write for example -10% or -2.5%")
    return Fraction(match[1]) / 100


def share_of(saved: int, total: int) -> str:
    """The shortest share of ``total`` that asks for just ``saved``, see :func:`amount_of_share`."""
    decimals = 0
    while True:
        # Rounded down: what a share asks for is rounded up.
        whole, part = divmod(saved * 100 * 10**decimals // total, 10**decimals)
        text = f"{whole}.{part:0{decimals}}" if decimals else str(whole)
        if ceil(Fraction(text) / 100 * total) == saved:
            return f"-{text}%"
        decimals += 1


@dataclass(frozen=True)
class Amount:
    """What the units have to save.

    Attributes:
        counted: what is counted: units, or elements of weights or of the cache of a token.
        needed: of the units, at least 1.
        tie_saves, removal_saves: by one unit.
        drop_saves: by all units of a layer.
        total: of the whole model before the plan.
        given: what spans and KV heads save already.
    """

    counted: Counted
    needed: int
    tie_saves: int
    removal_saves: int
    drop_saves: int
    total: int
    given: int = 0

    def saves(self, kind: str) -> int:
        return {"tie": self.tie_saves, "remove": self.removal_saves, "drop": self.drop_saves}[kind]

    def actions(self, kind: str) -> int:
        """Actions of one kind (tie, remove, drop) that are needed.

        Raises:
            PostshareError: it saves none of what is counted; or units are counted, and do not come
                to whole layers.
        """
        if kind == "drop" and self.counted == "units" and self.needed % self.drop_saves:
            layers, each = self.total // self.drop_saves, self.drop_saves
            near = sorted({max(1, self.needed // each), self.needed // each + 1})
            ratios = " or ".join(f"{ceil(10_000 * Fraction(n, layers)) / 10_000:g}" for n in near)
            raise PostshareError(
                f"plan.budget asks for {self.needed} of {self.total} units, and action drop "
                f"removes the {each} of a layer together; the nearest is "
                f"plan.budget.ratio={ratios} ({' or '.join(map(str, near))} of {layers} layers)"
            )
        if not self.saves(kind):
            raise PostshareError(
                "plan.budget.cache: a tied unit still caches keys and values of its own, ties save "
                "0 %; set plan.action=remove, or use spans or heads.kv_heads"
            )
        return ceil(Fraction(self.needed, self.saves(kind)))

    def in_each_layer(self, layers: int) -> int:
        """Units that every layer loses, where all lose as many: the fewest that save enough."""
        return ceil(Fraction(self.needed, layers * self.removal_saves))

    def check_each_layer(self, layout: HeadLayout) -> None:
        """Refuse what no whole number of units of every layer comes to.

        Raises:
            PostshareError: with the nearest that one does: a number of units is met exactly, a
                share by the fewest units that reach it, and every layer keeps one.
        """
        count, most = self.in_each_layer(layout.layers), layout.units - 1
        one = layout.layers * self.removal_saves
        if not most:
            raise PostshareError(
                f"plan.uniform: a layer has one of the {layout.unit_name}, and keeps it; set "
                "plan.uniform=false and plan.action=drop, or heads.kv_heads"
            )
        if self.counted != "units":
            self.check(
                most * one, f"{most} of the {layout.units} {layout.unit_name} of every layer"
            )
        elif self.needed != count * one or not 1 <= count <= most:
            near = sorted(
                {min(max(n, 1), most) for n in (self.needed // one, self.needed // one + 1)}
            )
            ratios = (f"{ceil(10_000 * Fraction(n, layout.units)) / 10_000:g}" for n in near)
            raise PostshareError(
                f"plan.budget asks for {self.needed} of {self.total} units, and plan.uniform "
                f"removes as many from each of {layout.layers} layers; the nearest is "
                f"plan.budget.ratio={' or '.join(ratios)} "
                f"({' or '.join(map(str, near))} of {layout.units} {layout.unit_name} a layer)"
            )

    def share(self, saved: int) -> str:
        """A saving by the units as a budget would state it, with what is given."""
        return f"-{100 * (saved + self.given) / self.total:.2f}%"

    def check(self, most: int, what: str = "the units that may change") -> None:
        """Raises PostshareError, with the nearest budget, when at most ``most`` can be saved.

        Args:
            what: saves it.
        """
        if 1 <= self.needed <= most:
            return
        if self.counted == "units":
            raise PostshareError(
                f"plan.budget asks for {self.needed} of {self.total} units, possible are 1 to "
                f"{most}; set plan.budget.ratio to at most {most / self.total:.4f}"
            )
        # Rounded down: the nearest that the user can ask for.
        nearest = int(10_000 * Fraction(most + self.given, self.total)) / 100
        raise PostshareError(
            f"plan.budget.{self.counted} asks for {self.share(self.needed)}; {what} save "
            f"{self.share(most)} at most: the nearest is plan.budget.{self.counted}=-{nearest}%"
        )


def units_of_ratio(ratio: float, layout: HeadLayout) -> int:
    """floor(ratio * all units), counted over all layers as published."""
    # Through the decimal that the user wrote: 0.29 of 100 units is 29, not floor(28.99...).
    return floor(Fraction(str(ratio)) * layout.layers * layout.units)


def units_of_heads(heads: int, layout: HeadLayout) -> int:
    """The units that so many attention heads are; with GQA those of whole KV groups.

    Raises:
        PostshareError: a number of heads that would split a KV group.
    """
    if heads % layout.heads_per_unit:
        nearest = max(1, round(heads / layout.heads_per_unit)) * layout.heads_per_unit
        raise PostshareError(
            f"plan.budget.heads {heads} splits a KV group of {layout.heads_per_unit} heads, which "
            f"are tied together; the nearest is {nearest}"
        )
    return heads // layout.heads_per_unit


def amount_of_units(count: int, layout: HeadLayout) -> Amount:
    """So many units, whether tied or removed."""
    return Amount("units", count, 1, 1, layout.units, layout.layers * layout.units)


def amount_of_share(
    counted: Counted,
    share: Fraction,
    given: PlanSavings,
    layout: HeadLayout,
    projections: Iterable[str],
) -> Amount:
    """A share of the whole model's parameters, bytes or cache.

    Args:
        given: what spans and KV heads save. They may leave nothing to the units: ``needed`` is 0
            or less then.
        layout: with the plan's KV heads.
        projections: that a tie shares.
    """
    if counted == "cache":
        total, saved = given.base_cache, given.base_cache - given.stored_cache
        removal = 2 * layout.head_dim
        drop = layout.units * removal
    else:
        total, saved = given.base_parameters, given.removed_parameters
        removal = sum(map(layout.unit_parameters, PROJECTIONS))
        drop = layout.units * removal + layout.hidden_size  # the norm goes too
    tie = tie_saves(counted, layout, projections)
    return Amount(counted, ceil(share * total) - saved, tie, removal, drop, total, saved)


def tie_saves(counted: Counted, layout: HeadLayout, projections: Iterable[str]) -> int:
    """What a tie of these projections saves; a tied unit keeps its part of the cache."""
    if counted == "cache":
        return 0
    return 1 if counted == "units" else sum(map(layout.unit_parameters, projections))
