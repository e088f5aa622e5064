"""How many operations the penalty takes, and that they add up to what a loop over pairs does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from tests.support import tiny
from tests.support.operations import Operations
from tests.support.penalty_loop import pull_pairs
from tests.support.pulled import Weights
from train.models.lora import adapt
from train.penalty.coupled import CHUNK_ELEMENTS, Penalty
from train.penalty.distances import L2, MSE, OfDifference
from train.penalty.lora import LoraPenalty
from train.penalty.stacked_units import add_columns, stacked_shape, units_of
from train.recipe.recipe import validate
from train.recipe.sections.penalty import KINDS

SHAPES = {
    "mha": HeadLayout(layers=33, hidden_size=64, heads=32, kv_heads=32, head_dim=2),
    "gqa": HeadLayout(layers=33, hidden_size=64, heads=64, kv_heads=32, head_dim=2),
}
MOST = 60
"""Operations of a projection, values and gradients together."""


def pulled(layout: HeadLayout, pairs: int, projections: tuple[str, ...]) -> SharingPlan:
    """Targets in all layers but the first, most of them of a source that others have too."""
    units = [(layer, unit) for layer in range(layout.layers) for unit in range(layout.units)]
    sources, targets = units[: layout.units + 1], units[layout.units + 1 :]
    random.Random(0).shuffle(targets)
    return SharingPlan(
        tuple(
            HeadTie(target, sources[i // 3 % len(sources)], projections)
            for i, target in enumerate(targets[:pairs])
        )
    )


# Of the others, sums are taken pair by pair where values are spread.
@pytest.mark.parametrize(
    ("kind", "sharded"), [(kind, False) for kind in sorted(KINDS)] + [("l2", True), ("mse", True)]
)
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_as_few_operations_for_many_pairs_as_for_few(name: str, kind: str, sharded: bool) -> None:
    layout, counted = SHAPES[name], []
    for pairs in (38, 1000):
        weights = Weights(layout)
        weights.sharded = sharded
        plan = pulled(layout, pairs, PROJECTIONS)
        # In chunks as on a GPU.
        penalty = Penalty(plan, layout, kind, chunk_elements=CHUNK_ELEMENTS)
        assert penalty.pairs == pairs
        penalty.apply(weights, 0.5)
        with Operations() as operations:
            penalty.apply(weights, 0.5)
        counted.append(operations.computing.total() / len(PROJECTIONS))
    assert max(counted) <= MOST, operations.computing
    if not sharded:  # else shared sources are added up in more rounds
        assert counted[0] == counted[1]


@pytest.mark.parametrize("projections", [("q",), ("k", "v"), ("o",), PROJECTIONS])
@pytest.mark.parametrize("kind", [L2(), MSE()])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("units", [1, 2, 8])
def test_the_gradient_is_that_of_a_loop_over_pairs(
    units: int, sharded: bool, kind: OfDifference, projections: tuple[str, ...]
) -> None:
    layout = HeadLayout(layers=5, hidden_size=24, heads=8, kv_heads=units, head_dim=6)
    plan = pulled(layout, 3 * units - 1, projections)
    batched, looped = Weights(layout), Weights(layout)
    batched.sharded = sharded
    penalty = Penalty(plan, layout, type(kind).__name__.lower())
    found = penalty.apply(batched, 0.7)
    expected = pull_pairs(looped, layout, plan, kind, 0.7 / penalty.pairs)
    assert found.value == pytest.approx(expected / penalty.pairs, rel=1e-6)
    for name, gradient in looped.gradients().items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            batched.gradients()[name], gradient, rtol=1e-6, atol=1e-6 * largest, msg=name
        )


@pytest.mark.parametrize("elements", [1, 2 * 2 * 24 * 24, 10**9])
def test_columns_are_added_to_by_whole_weights_as_by_views(elements: int) -> None:
    layout = HeadLayout(layers=5, hidden_size=24, heads=4, kv_heads=2, head_dim=6)
    weights = [torch.randn(layout.shape("o")) for _ in range(5)]
    expected = [weight.clone() for weight in weights]
    places = [7, 0, 9, 3, 2]
    parts = torch.randn(len(places), *stacked_shape(layout, "o"))
    views = units_of(expected, layout, "o")
    for place, part in zip(places, parts, strict=True):
        views[place] += part
    add_columns(weights, layout, "o", places, parts, elements)
    assert all(map(torch.equal, weights, expected))


@pytest.mark.parametrize("targets", [1, 12])
def test_adapters_take_no_operation_for_each_pair(tmp_path: Path, targets: int) -> None:
    made = tiny.recipe(tmp_path).model_dump(mode="json") | {"lora": {"rank": 2}}
    model = adapt(tiny.model(num_hidden_layers=4), validate(made))
    layout = HeadLayout.from_config(model.config)
    weights: Any = Weights(layout)
    weights.parameters = dict(model.named_parameters())
    ties = [HeadTie((1 + i // 4, i % 4), (0, i % 2), PROJECTIONS) for i in range(targets)]
    penalty = LoraPenalty(model, SharingPlan(tuple(ties)), layout)
    penalty.apply(weights, 0.5)
    with Operations() as operations:
        penalty.apply(weights, 0.5)
    assert operations.computing.total() / len(PROJECTIONS) <= MOST, operations.computing
