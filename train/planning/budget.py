"""A recipe's budget on a model: how much its units have to save, and which units may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.search import pairs
from sa_models.search.actions import KINDS, Space, make_space
from sa_models.search.budget import Amount, Counted, amount_of_share, amount_of_units, parse_share

if TYPE_CHECKING:
    from train.recipe.sections.plan import PlanSection

SHARES: tuple[Counted, ...] = ("parameters", "bytes", "cache")


def amount(
    section: PlanSection,
    config: Any,
    structure: SharingPlan,
    of_share: Callable[..., Amount] = amount_of_share,
) -> Amount:
    """What the budget asks of the units.

    Args:
        config: of the base model.
        structure: KV heads and spans.
        of_share: for a share of parameters, bytes or cache.

    Raises:
        PostshareError: a number of heads that splits a KV group, or a share that the structure
            alone saves.
    """
    budget = section.budget
    assert budget is not None
    for counted in SHARES:
        share = getattr(budget, counted)
        if share is not None:
            return of_share(counted, parse_share(share), config, structure, section.share)
    layout = structure.layout(config)
    return amount_of_units(pairs.Budget(budget.ratio, budget.heads).units(layout), layout)


def unit_budget(section: PlanSection, config: Any, structure: SharingPlan) -> pairs.Budget:
    """The budget of a strategy with one kind of action, as ratio or number of heads.

    Raises:
        PostshareError: see :func:`amount`; or a share that cannot be met, with the nearest that
            can.
    """
    assert section.budget is not None
    if section.budget.ratio is not None or section.budget.heads is not None:
        return pairs.Budget(section.budget.ratio, section.budget.heads)
    asked, layout = amount(section, config, structure), structure.layout(config)
    kind = "remove" if section.action == "remove" else "tie"
    possible = allowed_units(section, structure, layout)
    count = asked.units(kind)
    asked.check(len(possible.removable if kind == "remove" else possible.tied) * asked.saves(kind))
    return pairs.Budget(heads=count * layout.heads_per_unit)


@dataclass(frozen=True)
class AllowedUnits:
    """Units that may be tied, and removed; layers whose units are no sources."""

    tied: list[tuple[int, int]]
    removable: list[tuple[int, int]]
    followers: frozenset[int]


def allowed_units(section: PlanSection, structure: SharingPlan, layout: HeadLayout) -> AllowedUnits:
    """Layers of the recipe's skip_layers and followers keep their units; from a layer in a span,
    its leader's included, none is removed."""
    skipped, followers = section.skip_layers, frozenset(structure.leader_of())
    in_spans = {layer for span in structure.spans for layer in span.layers}
    return AllowedUnits(
        pairs.eligible_units(layout, (*skipped, *followers)),
        pairs.eligible_units(layout, (*skipped, *in_spans)),
        followers,
    )


def search_space(section: PlanSection, config: Any, structure: SharingPlan) -> Space:
    """What strategies loss, magnitude and gradient choose from.

    Raises:
        PostshareError: a budget that cannot be met, with the nearest that can.
    """
    layout, asked = structure.layout(config), amount(section, config, structure)
    possible = allowed_units(section, structure, layout)
    kinds = KINDS if section.action == "any" else (section.action,)
    space = make_space(
        layout,
        kinds,
        section.share,
        possible.tied,
        possible.removable,
        possible.followers,
        (asked.tie_saves, asked.removal_saves),
        asked.needed,
    )
    asked.check(space.most())
    return space
