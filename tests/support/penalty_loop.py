"""The penalty of a kind of the difference, pair by pair: what the batched one must equal."""

from __future__ import annotations

from sa_models.heads import HeadLayout, unit_view
from sa_models.plan import SharingPlan
from tests.support.pulled import Weights
from train.penalty.distances import OfDifference


def pull_pairs(
    weights: Weights, layout: HeadLayout, plan: SharingPlan, kind: OfDifference, scale: float
) -> float:
    """Add `scale` times the gradient of the sum of distances, in closed form; return the sum."""
    shards = weights.shards()
    total = 0.0
    for tie in plan.ties:
        for p in tie.projections:
            at = [
                (shards[layout.parameter_name(layer, p)], unit)
                for layer, unit in (tie.target, tie.source)
            ]
            x, y = (
                unit_view(shard.values.view(shard.shape), layout, p)[unit] for shard, unit in at
            )
            to_x, to_y = (
                unit_view(shard.read_gradient().view(shard.shape), layout, p)[unit]
                for shard, unit in at
            )
            difference = x - y
            length = float(difference.norm())
            total += kind.value(length, length**2, x.numel())
            slope = kind.slope(length, x.numel()) if length else 0.0
            to_x.add_(difference, alpha=slope * scale)
            to_y.sub_(difference, alpha=slope * scale)
    return total
