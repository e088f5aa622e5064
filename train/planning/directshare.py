"""DirectShare as published, as a control: pairs whose q and k are most alike, at as many bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.savings import llama_parameters
from sa_models.search.budget import share_of
from train.planning.find import find_ties
from train.planning.problem import PlanProblem
from train.recipe.sections.plan import Budget, PlanSection

if TYPE_CHECKING:
    from sa_models.weights.safetensors_folder import WeightsFolder


def directshare_plan(config: Any, weights: WeightsFolder, saved: int) -> SharingPlan:
    """Ties of q, k and v by the cosine of q and k (PostShare, arXiv 2402.11819, section 3).

    Args:
        config: of the base model.
        weights: of the base model.
        saved: parameters that it saves at least; the last tie may save more.

    Raises:
        PostshareError: ties of q, k and v cannot save as much, or there is nothing to be saved.
    """
    if saved <= 0:
        raise PostshareError(
            "evaluate.directshare: the plan saves no bytes; set evaluate.directshare=false"
        )
    share = share_of(saved, llama_parameters(config))
    section = PlanSection(strategy="cosine", budget=Budget(parameters=share))
    try:
        return find_ties(PlanProblem(section, config), weights)[0]
    except PostshareError as error:
        raise PostshareError(
            f"evaluate.directshare: it cannot save as much as the plan ({error}); "
            "set evaluate.directshare=false"
        ) from None
