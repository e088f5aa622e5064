"""Strategy basis: q, k and v of adjacent layers on one basis, in what a budget leaves of them.

The ranks follow from the shape and the budget alone; which factors, calibration text decides when
weights are materialized.
"""

from __future__ import annotations

from typing import Any

from sa_models.basis import basis_of, parameter_range
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from train.planning.problem import PlanProblem

BASIS_LAYERS = 2
"""Adjacent layers that share a basis where a recipe does not say: the paper's main setting."""


def basis_plan(problem: PlanProblem) -> SharingPlan:
    """The plan of strategy basis, which goes with no structure.

    Raises:
        PostshareError: a budget that factors of q, k and v cannot meet, with the nearest that they
            can.
    """
    asked, layers = problem.required, problem.section.basis_layers
    least, whole = parameter_range(problem.layout, layers)
    asked.check(whole - least, "factors of q, k and v")
    if (plan := saving_plan(problem.config, asked.needed, layers)) is None:
        raise PostshareError(
            f"plan.budget.{asked.counted} leaves too few parameters for a rank in every group of "
            "layers; ask for less"
        )
    return plan


def saving_plan(config: Any, saved: int, layers: int = BASIS_LAYERS) -> SharingPlan | None:
    """The plan whose factors save at least so many parameters; None where q, k and v hold too
    little, or nothing is to be saved."""
    layout = HeadLayout.from_config(config)
    _, whole = parameter_range(layout, layers)
    basis = basis_of(layout, layers, whole - saved)
    return None if basis is None else SharingPlan(basis=basis)
