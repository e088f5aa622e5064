"""Strategy auto, where the recipe reconstructs: what Basis Sharing would lose at as many bytes.

It is measured beside the plans that are compared after reconstruction. Where it is better, auto
takes it, if the budget counts parameters or bytes: its factors change no heads and save no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.evaluation.bootstrap import Interval
from train.planning.basis import saving_plan

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from sa_models.plan import SharingPlan
    from train.recipe.recipe import Recipe

BASIS = "Basis Sharing"


@dataclass(frozen=True)
class Factored:
    """Basis Sharing at as many stored parameters as the best plan of ties, removals, spans and KV
    groups.

    Attributes:
        plan: with its basis.
        saved: parameters, no fewer than the other plan's.
        loss: nats per token, untrained, on the text of the reconstruction.
        above: 95 % interval of how far the loss of the best other plan lies above it, over blocks.
        taken: whether it is the chosen plan.
    """

    plan: SharingPlan
    saved: int
    loss: float
    above: Interval
    taken: bool

    @property
    def is_better(self) -> bool:
        """Than that plan, by more than chance."""
        return self.above[0] > 0


def rival(recipe: Recipe, plan: SharingPlan, config: LlamaConfig) -> SharingPlan | None:
    """Basis Sharing that stores no more than the plan; None where it is no rival.

    That is where the budget is one of cache, the recipe has a structure of its own or a penalty,
    which pulls units, or q, k and v hold too little.
    """
    budget = recipe.plan.budget
    if budget is None or budget.cache is not None or recipe.penalized or recipe.changes_structure:
        return None
    return saving_plan(config, plan.savings(config).removed_parameters)


def may_take(recipe: Recipe) -> bool:
    """Whether the recipe allows it, and the budget is met without changing a head."""
    plan, budget = recipe.plan, recipe.plan.budget
    return plan.basis and budget is not None and (budget.parameters or budget.bytes) is not None
