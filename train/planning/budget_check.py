"""Whether a recipe's budget can be met on a model, from its config alone. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sa_models.plan import SharingPlan
from sa_models.search import pairs
from train.planning.auto_space import check_auto
from train.planning.basis import basis_plan
from train.planning.budget import search_space, unit_budget
from train.recipe.sections.plan import MATCHED

if TYPE_CHECKING:
    from train.recipe.sections.plan import PlanSection


def check_budget(section: PlanSection, config: Any, structure: SharingPlan) -> None:
    """Raises PostshareError when the budget cannot be met; see :mod:`train.planning.budget`."""
    skipped, layout = skipped_layers(section, structure), structure.layout(config)
    if section.strategy in MATCHED:
        pairs.units_to_tie(unit_budget(section, config, structure), layout, skipped)
    elif section.strategy == "basis":
        basis_plan(section, config)
    elif section.strategy == "auto":
        check_auto(section, config, structure)
    else:
        search_space(section, config, structure)


def skipped_layers(section: PlanSection, structure: SharingPlan) -> tuple[int, ...]:
    """Layers whose units are no targets: those of the recipe, and followers.

    A follower lacks some of the projections that ties share, so that found ties leave it out. From
    a layer in a span, its leader's included, no unit can be removed.
    """
    if section.action == "remove":
        return tuple(
            sorted({*section.skip_layers, *(i for s in structure.spans for i in s.layers)})
        )
    return tuple(sorted({*section.skip_layers, *structure.leader_of()}))
