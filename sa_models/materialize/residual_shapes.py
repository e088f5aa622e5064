"""Shapes and ranks of low-rank residuals, from the plan and the config alone. Imports no torch."""

from __future__ import annotations

from typing import Any

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import SharingPlan


def residual_shapes(plan: SharingPlan, config: Any) -> dict[tuple[int, str], tuple[int, int]]:
    """{(layer, projection) with a tied unit: (out_features, in_features)}, in the model's order."""
    layout = plan.layout(config)
    kept = plan.kept_units(layout)
    tied = {(tie.target[0], p) for tie in plan.effective().ties for p in tie.projections}
    return {
        (layer, p): layout.with_units(len(kept[layer])).shape(p)
        for layer in range(layout.layers)
        for p in PROJECTIONS
        if (layer, p) in tied
    }


def residual_parameters(plan: SharingPlan, config: Any, rank: int) -> int:
    """Parameters of the residuals of a plan."""
    return rank * sum(sum(shape) for shape in residual_shapes(plan, config).values())


def check_rank(rank: int, layout: HeadLayout) -> None:
    """Raises PostshareError for a rank that is larger than the head."""
    if rank > layout.head_dim:
        raise PostshareError(
            f"residual.rank is {rank}, larger than the head of {layout.head_dim} dimensions: it "
            f"would store more than the head itself; set residual.rank to {layout.head_dim // 2} "
            "or less"
        )
