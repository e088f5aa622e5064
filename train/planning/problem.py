"""The problem that a search of a plan solves: what a recipe's budget asks of a model's units.

Imports no torch, so that an estimate needs none.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan, Unit
from sa_models.savings import PlanSavings
from sa_models.search import pairs
from sa_models.search.actions import KINDS, Space, make_space
from sa_models.search.budget import (
    Amount,
    amount_of_share,
    amount_of_units,
    units_of_heads,
    units_of_ratio,
)

if TYPE_CHECKING:
    import torch

    from train.recipe.sections.plan import Budget, PlanSection


@dataclass(frozen=True)
class AllowedUnits:
    """Units that may be tied, and removed; layers whose units are no sources."""

    tied: list[Unit]
    removable: list[Unit]
    followers: frozenset[int]


@dataclass(frozen=True)
class PlanProblem:
    """A recipe's plan section on a model with a structure.

    Attributes:
        config: of the base model, or its :class:`~train.estimate.llama_shapes.LlamaShape`.
        structure: KV heads and spans, which become part of the plan.
    """

    section: PlanSection
    config: Any
    structure: SharingPlan = field(default_factory=SharingPlan)

    def within(self, structure: SharingPlan) -> PlanProblem:
        """The same section on the model with another structure."""
        return replace(self, structure=structure)

    @property
    def budget(self) -> Budget:
        """Of the section, whose strategy needs one."""
        assert self.section.budget is not None
        return self.section.budget

    @cached_property
    def layout(self) -> HeadLayout:
        """With the structure's KV heads."""
        return self.structure.layout(self.config)

    @cached_property
    def savings(self) -> PlanSavings:
        """Of the structure alone."""
        return self.structure.savings(self.config)

    @cached_property
    def remaining(self) -> Amount:
        """What the budget leaves to the units; nothing (``needed`` 0 or less) where the structure
        meets it.

        Raises:
            PostshareError: a number of heads that splits a KV group.
        """
        budget, layout = self.budget, self.layout
        if budget.share is not None:
            return amount_of_share(*budget.share, self.savings, layout, self.section.share)
        if budget.heads is not None:
            return amount_of_units(units_of_heads(budget.heads, layout), layout)
        assert budget.ratio is not None
        return amount_of_units(units_of_ratio(budget.ratio, layout), layout)

    @cached_property
    def required(self) -> Amount:
        """What the units have to save.

        Raises:
            PostshareError: as :attr:`remaining`; or a share that the structure alone saves.
        """
        asked = self.remaining
        if self.budget.share is not None and asked.needed <= 0:
            counted, share = self.budget.share
            raise PostshareError(
                f"plan.budget.{counted}: spans and KV heads alone save "
                f"{asked.given / asked.total:.2%}, which is the {float(share):.2%} asked for; "
                "raise it, or set plan.strategy=none and plan.budget=null"
            )
        return asked

    @property
    def kind(self) -> str:
        """What a strategy with one kind of action does: tie or remove a unit, or drop a layer."""
        return self.section.action if self.section.removes else "tie"

    def skipped_layers(self, kind: str) -> tuple[int, ...]:
        """Layers whose units are not tied (removed): those of the recipe, and followers.

        A follower lacks some of the projections that ties share. From a layer in a span, its
        leader's included, no unit can be removed.
        """
        spans = self.structure.spans
        kept = (layer for s in spans for layer in (s.followers if kind == "tie" else s.layers))
        return tuple(sorted({*self.section.skipped, *kept}))

    @cached_property
    def allowed(self) -> AllowedUnits:
        removable = pairs.eligible_units(self.layout, self.skipped_layers("remove"))
        if self.section.uniform:  # of layer 0 too
            removable = [
                (layer, unit)
                for layer in range(self.layout.layers)
                for unit in range(self.layout.units)
            ]
        return AllowedUnits(
            pairs.eligible_units(self.layout, self.skipped_layers("tie")),
            removable,
            frozenset(self.structure.leader_of()),
        )

    def needed_of(self, asked: Amount) -> int:
        """What the units save at least; with `plan.uniform` no less than whole numbers of every
        layer do."""
        each = self.in_each_layer * self.layout.layers * asked.removal_saves
        return max(asked.needed, each)

    @cached_property
    def in_each_layer(self) -> int:
        """Units that every layer loses, with `plan.uniform`; else 0."""
        return self.remaining.in_each_layer(self.layout.layers) if self.section.uniform else 0

    def check_uniform(self) -> None:
        """Raises PostshareError, with `plan.uniform`: see :meth:`Amount.check_each_layer`; or no
        stock config takes as many heads as are left."""
        if not self.section.uniform:
            return
        self.required.check_each_layer(self.layout)
        self.check_stock_heads()

    @property
    def has_stock_heads(self) -> bool:
        """Whether a stock config takes the heads that `plan.uniform` leaves."""
        units = self.layout.units - self.in_each_layer
        if not self.section.uniform or units < 1 or not getattr(self.config, "mlp_bias", False):
            return True
        return self.layout.hidden_size % self.layout.with_units(units).heads == 0

    def check_stock_heads(self) -> None:
        """Raises PostshareError, with `plan.uniform`: no stock config takes as many heads as are
        left."""
        if not self.has_stock_heads:
            left = self.layout.with_units(self.layout.units - self.in_each_layer)
            raise PostshareError(
                f"plan.uniform: {left.heads} heads do not divide hidden_size {left.hidden_size}, "
                "which no stock config takes of a Llama with mlp_bias; choose a budget that leaves "
                "a number of heads that does"
            )

    @cached_property
    def droppable(self) -> list[int]:
        """The layers that may lose their attention: all their units may be removed."""
        removable = Counter(layer for layer, _ in self.allowed.removable)
        return [layer for layer, count in sorted(removable.items()) if count == self.layout.units]

    @cached_property
    def units(self) -> int:
        """How many units a strategy that ties or removes single ones changes.

        Raises:
            PostshareError: as :attr:`required`; or a share that cannot be met, with the nearest
                that can.
        """
        asked, allowed = self.required, self.allowed
        count = asked.actions(self.kind)
        if asked.counted != "units":
            possible = allowed.tied if self.kind == "tie" else allowed.removable
            asked.check(len(possible) * asked.saves(self.kind))
        return count

    @cached_property
    def space(self) -> Space:
        """What strategies loss, magnitude and gradient choose from; with action drop all.

        Raises:
            PostshareError: a budget that cannot be met, with the nearest that can.
        """
        self.check_uniform()
        asked, allowed = self.required, self.allowed
        space = make_space(
            self.layout,
            KINDS if self.section.action == "any" else (self.section.action,),
            self.section.share,
            allowed.tied,
            allowed.removable,
            allowed.followers,
            (asked.tie_saves, asked.removal_saves),
            self.needed_of(asked),
            self.droppable,
            asked.drop_saves,
            self.in_each_layer,
        )
        if self.section.action == "drop":
            asked.actions("drop")
        asked.check(space.most())
        return space


def least_important_of(problem: PlanProblem, importance: torch.Tensor) -> tuple[Unit, ...]:
    """The units of least importance that the budget asks for, or those of the layers whose units
    have the smallest sum of it.

    Args:
        importance: (layers, units).

    Raises:
        PostshareError: see :attr:`PlanProblem.space`.
    """
    from sa_models.scores.magnitude import least_important

    space = problem.space
    if problem.kind == "drop":
        count, units = math.ceil(space.needed / space.drop_saves), range(problem.layout.units)
        layers = [(layer, 0) for layer in space.droppable]
        chosen = least_important(importance.sum(1, keepdim=True), layers, count, keep=0)
        return tuple((layer, unit) for layer, _ in chosen for unit in units)
    if space.uniform:
        return tuple(
            unit
            for _, here in groupby(space.removable, key=lambda unit: unit[0])
            for unit in least_important(importance, list(here), space.uniform)
        )
    count = math.ceil(space.needed / space.removal_saves)
    return least_important(importance, space.removable, count)
