"""The actions that seem cheapest from a state, by the estimates of :mod:`~sa_models.sensitivity`.

What an action is expected to cost is the second order alone; the first is the slope of this text
(see :mod:`~sa_models.plan_search`).

The calibration text is taken in two halves, whose sums are those of the whole. How well the halves
agree on the units to change tells whether there is enough text for a stable choice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import PostshareError
from .plan_actions import Action, Space, State, ordered
from .plan_measure import MeasuredLoss
from .plan_search import SOURCES_PER_TARGET, Ranked, price
from .restart import Batch
from .sensitivity import Sensitivity, combined, estimate_sensitivity
from .similarity import Progress

STABLE = 2 / 3
"""Share of the chosen units on which both halves agree, below which the choice is not stable."""


@dataclass(frozen=True)
class Agreement:
    """How far two halves of the calibration text would choose the same.

    Attributes:
        units: that are chosen.
        common: of them, those that both halves choose.
        correlation: Spearman correlation of what the units cost on the halves.
    """

    units: int
    common: int
    correlation: float

    @property
    def is_stable(self) -> bool:
        return self.common >= STABLE * self.units


class EstimatedRanking:
    """A :data:`~sa_models.plan_search.Ranking`; what it says is cached with the measurements.

    Args:
        without: layers that are neither changed nor sources.
        progress: called with (done, total) blocks, at every estimate.

    Attributes:
        agreement: of the halves, at the first estimate.
        estimates: how many were made (and not read from the cache).

    Raises:
        PostshareError: fewer than two blocks.
    """

    def __init__(
        self,
        space: Space,
        measured: MeasuredLoss,
        without: Iterable[int] = (),
        progress: Progress | None = None,
    ) -> None:
        self.space, self.measured, self.without = space, measured, tuple(sorted(without))
        self.progress = progress
        self.agreement: Agreement | None = None
        self.estimates = 0
        self._halves = halves(measured.batches)

    def __call__(self, state: State, count: int) -> list[Ranked]:
        space = self.space
        about = [
            [a.to_list() for a in ordered(state)],
            count,
            space.share,
            space.needed,
            [space.tie_saves, space.removal_saves],
            [space.targets, space.removable],
            self.without,
        ]
        text = json.dumps(about, separators=(",", ":"))
        key = f"rank {hashlib.sha256(text.encode()).hexdigest()}"
        value = self.measured.cache.get(key, lambda: self._estimate(state, count))
        if self.agreement is None:
            self.agreement = Agreement(*value["agreement"])
        return [Ranked(Action.from_list(a), *numbers) for a, *numbers in value["actions"]]

    def _estimate(self, state: State, count: int) -> dict[str, Any]:
        self.estimates += 1
        self.measured.rebase(state)
        model = self.measured.at_base()
        shares = [self.space.share] if self.space.targets else []
        total = sum(map(len, self._halves))
        parts: list[Sensitivity] = []
        for half in self._halves:
            report = self._report(total - len(half) if parts else 0, total)
            parts.append(estimate_sensitivity(model, half, shares, self.without, report))
        ranked = [cheapest(self.space, state, part) for part in (*parts, combined(*parts))]
        actions = [[r.action.to_list(), r.rise, r.slope] for r in ranked[-1][:count]]
        return {"actions": actions, "agreement": list(agreement(self.space, *ranked[:2]))}

    def _report(self, before: int, total: int) -> Progress | None:
        show = self.progress
        return None if show is None else lambda done, _: show(before + done, total)


def halves(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The rows of calibration text in two parts of the same number, give or take one.

    Raises:
        PostshareError: fewer than two rows.
    """
    rows: list[Batch] = [
        {name: tensor[i : i + 1] for name, tensor in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
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
    for unit in sorted({*space.targets, *space.removable} - changed):
        options: list[Ranked] = []
        if unit in space.removable:
            removal = estimated.removal
            options.append(_ranked(Action(unit), removal.second[unit], removal.first[unit]))
        if unit in space.targets:
            ties = estimated.ties[space.share]
            rises, slopes = ties.second[unit].flatten(), ties.first[unit].flatten()
            left = 2 * SOURCES_PER_TARGET
            for index in rises.nan_to_num(torch.inf).argsort(stable=True).tolist():
                source = divmod(index, space.layout.units)
                if left == 0 or math.isnan(rises[index]):
                    break
                if source in space.sources and source not in changed:
                    tie = Action(unit, source, space.share)
                    options.append(_ranked(tie, rises[index], slopes[index]))
                    left -= 1
        found += [option for option in options if space.allows(state, option.action)]
    return sorted(found, key=lambda r: (price(space, r.action, r.rise), r.action.key))


def _ranked(action: Action, rise: torch.Tensor, slope: torch.Tensor) -> Ranked:
    return Ranked(action, float(rise), float(slope))


def agreement(space: Space, first: list[Ranked], second: list[Ranked]) -> tuple[int, int, float]:
    """See :class:`Agreement`."""
    costs: list[dict[Any, float]] = [{}, {}]
    for ranked, cost in zip((first, second), costs, strict=True):
        for action, rise, _ in ranked:
            cost.setdefault(action.target, price(space, action, rise))
    units = sorted(costs[0].keys() & costs[1].keys())
    saves = min(s for s in (space.tie_saves, space.removal_saves) if s > 0)
    count = min(len(units), math.ceil(space.needed / saves))
    chosen = [set(sorted(units, key=lambda u: (cost[u], u))[:count]) for cost in costs]
    a, b = (torch.tensor([cost[u] for u in units], dtype=torch.float64) for cost in costs)
    return count, len(chosen[0] & chosen[1]), spearman(a, b)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors without equal values; 1 for fewer than two values."""
    if len(a) < 2:
        return 1.0
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
