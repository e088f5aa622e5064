"""DirectShare as a control: which pairs, and how many, against a plain search of its own."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.weights.safetensors_folder import WeightsFolder
from train.demo import demo_base_path
from train.planning.directshare import directshare_plan

UNIT = 3 * 16 * 128  # parameters of q, k and v of one of the 64 heads


def pairs_by_hand(weights: WeightsFolder, count: int) -> dict[tuple[int, int], tuple[int, int]]:
    """The units that are most like one of a lower layer, each with the one it is most like."""
    units = list(product(range(8), range(8)))
    flat = {}
    for layer, head in units:
        q, k = (
            weights.read(f"model.layers.{layer}.self_attn.{p}_proj.weight").double()[
                16 * head : 16 * head + 16
            ]
            for p in "qk"
        )
        flat[layer, head] = torch.cat([q.flatten(), k.flatten()])
    best = {}
    for target in units:
        below = [source for source in units if source[0] < target[0]]
        if below:
            score = {s: torch.cosine_similarity(flat[target], flat[s], dim=0) for s in below}
            best[target] = max(below, key=lambda s: float(score[s])), max(score.values())
    chosen: dict[tuple[int, int], tuple[int, int]] = {}
    for target in sorted(best, key=lambda t: -float(best[t][1]))[:count]:
        chosen[target] = best[target][0]
    return chosen


@pytest.mark.parametrize(("saved", "count"), [(UNIT, 1), (UNIT + 1, 2), (17 * UNIT + 100, 18)])
def test_it_ties_as_many_pairs_as_save_what_is_asked(saved: int, count: int) -> None:
    weights = WeightsFolder(Path(demo_base_path()))
    plan = directshare_plan(weights.config, weights, saved)
    savings = plan.savings(weights.config)
    assert len(plan.ties) == count == savings.tied_heads
    assert savings.removed_parameters == count * UNIT >= saved
    assert {tie.projections for tie in plan.ties} == {("q", "k", "v")}
    by_hand = pairs_by_hand(weights, count)
    assert {tie.target for tie in plan.ties} == set(by_hand)
    for tie in plan.ties:  # a root source: what its own source is, where it is tied itself
        source = by_hand[tie.target]
        while source in by_hand:
            source = by_hand[source]
        assert tie.source == source


def test_more_than_ties_can_save_is_refused() -> None:
    weights = WeightsFolder(Path(demo_base_path()))
    layout = HeadLayout.from_config(weights.config)
    with pytest.raises(PostshareError, match=r"evaluate\.directshare: .* set evaluate\.direct"):
        directshare_plan(weights.config, weights, layout.layers * layout.units * UNIT)


@pytest.mark.parametrize("saved", [0, -5])
def test_a_plan_that_saves_nothing_has_none(saved: int) -> None:
    weights = WeightsFolder(Path(demo_base_path()))
    with pytest.raises(PostshareError, match=r"the plan saves no bytes; set evaluate\.direct"):
        directshare_plan(weights.config, weights, saved)
