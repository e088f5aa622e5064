"""The actions that seem cheapest from a state, by the estimates of :mod:`~sa_models.scores.fisher`.

What an action is expected to cost is the second order alone; the first is the slope of this text
(see :mod:`~sa_models.search.algorithms`).

The calibration text is taken in two halves, whose sums are those of the whole. How well the halves
agree on the units to change tells whether there is enough text for a stable choice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from sa_models.calibration.partial_forward import Batch, rows_of
from sa_models.calibration.progress import Progress, ProgressBar
from sa_models.errors import PostshareError
from sa_models.scores.fisher import Rise, Sensitivity, combined, estimate_sensitivity
from sa_models.search.actions import WHOLE, Action, Projections, Space, State, ordered
from sa_models.search.algorithms import SOURCES_PER_TARGET, Ranked, price
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.ties import Unit

STABLE = 0.8
"""Share of the chosen units on which both halves agree, below which the choice is not stable."""
REACH = 8
"""Layers below a target's in which its sources are looked for: attention of far layers is rarely
alike, and the time of an estimate is in proportion to the pairs of layers."""


@dataclass(frozen=True)
class Agreement:
    """How far two halves of the calibration text would choose the same.

    Attributes:
        units: that are chosen; layers, where only whole ones are dropped.
        common: of them, those that both halves choose.
        correlation: Spearman correlation of what the units cost on the halves.
    """

    units: int
    common: int
    correlation: float

    @property
    def is_stable(self) -> bool:
        return self.common >= STABLE * self.units

    def blocks_needed(self, blocks: int) -> int:
        """Blocks with which both halves are expected to agree on :data:`STABLE` of the units.

        The noise of a mean falls with the root of the text; so does the share of the units that it
        exchanges.
        """
        differing = 1 - self.common / self.units
        return math.ceil(round(blocks * (differing / (1 - STABLE)) ** 2, 6))


class Estimator:
    """Estimates on the two halves of the calibration text, which several searches may share.

    Args:
        shares: the sets of projections that ties of any of the searches share.
        without: layers that are neither changed nor sources.
        bar: of each estimate, which is told (done, total) blocks.

    Attributes:
        made: estimates so far.

    Raises:
        PostshareError: fewer than two blocks.
    """

    def __init__(
        self,
        measured: MeasuredLoss,
        shares: Iterable[Projections] = (),
        without: Iterable[int] = (),
        bar: ProgressBar = lambda: nullcontext(lambda done, total: None),
    ) -> None:
        self.measured, self.shares = measured, tuple(shares)
        self.without, self.bar = tuple(sorted(without)), bar
        self.made = 0
        self._halves = halves(measured.batches)
        self._first: list[Sensitivity] = []

    def at(self, state: State, shares: Iterable[Projections]) -> list[Sensitivity]:
        """Of each half, with a state in the weights, for these ties; all searches begin alike."""
        if not state and self._first:
            return self._first
        self.made += 1
        self.measured.rebase(state)
        model = self.measured.at_base()
        wanted = tuple(shares) if state else self.shares
        parts: list[Sensitivity] = []
        with self.bar() as show:
            for half in self._halves:
                report = self._report(show, len(self._halves[0]) if parts else 0)
                parts.append(estimate_sensitivity(model, half, wanted, self.without, report, REACH))
        if not state:
            self._first = parts
        return parts

    def _report(self, show: Progress, before: int) -> Progress:
        total = sum(map(len, self._halves))
        return lambda done, _: show(before + done, total)


class EstimatedRanking:
    """A :data:`~sa_models.search.algorithms.Ranking`; what it says is cached with the measurements.

    Args:
        without: layers that are neither changed nor sources.
        estimator: shared with other searches of this model and text.

    Attributes:
        agreement: of the halves, at the first estimate.

    Raises:
        PostshareError: fewer than two blocks.
    """

    def __init__(
        self,
        space: Space,
        measured: MeasuredLoss,
        without: Iterable[int] = (),
        estimator: Estimator | None = None,
    ) -> None:
        self.space, self.measured, self.without = space, measured, tuple(sorted(without))
        self.agreement: Agreement | None = None
        self._shares = self._every = tuple(space.shares) if space.targets else ()
        self._estimator = estimator or Estimator(measured, self._shares, without)

    @property
    def estimates(self) -> int:
        """How many were made (and not read from the cache)."""
        return self._estimator.made

    def __call__(self, state: State, count: int) -> list[Ranked]:
        ranked = self._ranked(state, count)
        if len(ranked) < count and self._shares != self._every:
            self._shares = self._every  # what is left may be of ties that were far
            ranked = self._ranked(state, count)
        # Ties that are far from being taken are not estimated again, which takes most of the time.
        near = {r.action.projections for r in ranked[:count]}
        self._shares = tuple(share for share in self._shares if share in near)
        return ranked

    def _ranked(self, state: State, count: int) -> list[Ranked]:
        space = self.space
        shares = list(space.shares)
        about = [
            [a.to_list() for a in ordered(state)],
            count,
            shares[0] if len(shares) == 1 else shares,
            space.needed,
            [space.tie_saves, space.removal_saves],
            [space.targets, space.removable],
            self.without,
            self._shares,
        ]
        if space.droppable:
            about.append([space.droppable, space.drop_saves])
        if space.uniform:
            about.append(space.uniform)
        if space.emptiable:
            about.append(["emptied", sorted(space.emptiable), space.drop_saves])
        text = json.dumps(about, separators=(",", ":"))
        key = f"rank {hashlib.sha256(text.encode()).hexdigest()}"
        value = self.measured.cache.get(key, lambda: self._estimate(state, count))
        if self.agreement is None:
            self.agreement = Agreement(*value["agreement"])
        return [Ranked(Action.from_list(a), *numbers) for a, *numbers in value["actions"]]

    def _estimate(self, state: State, count: int) -> dict[str, Any]:
        parts = self._estimator.at(state, self._shares)
        ranked = [cheapest(self.space, state, part) for part in (*parts, combined(*parts))]
        # With several kinds of ties a unit has more actions: so many more are told.
        told = ranked[-1][: count * max(1, len(self._shares))]
        actions = [[r.action.to_list(), r.rise, r.slope, r.removal] for r in told]
        return {"actions": actions, "agreement": list(agreement(self.space, *ranked[:2]))}


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The rows of calibration text in two parts of the same number, give or take one.

    Raises:
        PostshareError: fewer than two rows.
    """
    rows = rows_of(batches)
    if len(rows) < 2:
        raise PostshareError(
            "the calibration text is a single block, which cannot tell whether the choice is "
            "stable; raise plan.calibration_blocks, or add text to data.train"
        )
    return rows[0::2], rows[1::2]


def cheapest(space: Space, state: State, estimated: Sensitivity) -> list[Ranked]:
    """The allowed actions by what they seem to cost, a few sources for every target."""
    changed = {action.target for action in state}
    found: list[Ranked] = []
    for unit in sorted({*space.targets, *space.removable}):
        options: list[Ranked] = []
        removal = estimated.removal
        gone = float(removal.second[unit])
        if unit in space.removable and unit not in changed:
            options.append(_ranked(Action(unit), removal.second[unit], removal.first[unit], gone))
        for share in space.shares if unit in space.targets else ():
            if share not in estimated.ties:
                continue
            if unit not in changed or space.may_tie_again(state, unit, share):
                options += _nearest(space, changed, unit, share, estimated.ties[share], gone)
        found += [option for option in options if space.allows(state, option.action)]
    for layer in space.droppable:
        drop = estimated.drop
        gone = float(drop.second[layer])
        option = _ranked(Action((layer, WHOLE)), drop.second[layer], drop.first[layer], gone)
        found += [option] if space.allows(state, option.action) else []
    return sorted(found, key=lambda r: (price(space, r.action, r.rise), r.action.key))


def _nearest(
    space: Space, changed: set[Unit], unit: Unit, share: Projections, ties: Rise, gone: float
) -> list[Ranked]:
    """The ties of one unit, for some projections, to the sources that seem to cost least."""
    rises, slopes = ties.second[unit].flatten(), ties.first[unit].flatten()
    found: list[Ranked] = []
    for index in rises.nan_to_num(torch.inf).argsort(stable=True).tolist():
        source = divmod(index, space.layout.units)
        if len(found) == 2 * SOURCES_PER_TARGET or math.isnan(rises[index]):
            break
        if source in space.sources and source not in changed:
            action = Action(unit, source, share)
            found.append(_ranked(action, rises[index], slopes[index], gone))
    return found


def _ranked(action: Action, rise: torch.Tensor, slope: torch.Tensor, gone: float) -> Ranked:
    return Ranked(action, float(rise), float(slope), gone)


def agreement(space: Space, first: list[Ranked], second: list[Ranked]) -> tuple[int, int, float]:
    """See :class:`Agreement`."""
    costs: list[dict[Any, float]] = [{}, {}]
    for ranked, cost in zip((first, second), costs, strict=True):
        for action, rise, *_ in ranked:
            cost.setdefault(action.target, price(space, action, rise))
    units = sorted(costs[0].keys() & costs[1].keys())
    saves = min(s for s in (space.tie_saves, space.removal_saves, space.drop_saves) if s > 0)
    count = min(len(units), math.ceil(space.needed / saves))
    alike = [units]
    if space.uniform:  # each layer chooses for itself
        count //= space.layout.layers
        alike = [list(here) for _, here in groupby(units, key=lambda unit: unit[0])]
    chosen = [
        {u for here in alike for u in sorted(here, key=lambda u: (cost[u], u))[:count]}
        for cost in costs
    ]
    a, b = (torch.tensor([cost[u] for u in units], dtype=torch.float64) for cost in costs)
    return len(chosen[0]), len(chosen[0] & chosen[1]), spearman(a, b)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors without equal values; 1 for fewer than two values."""
    if len(a) < 2:
        return 1.0
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
