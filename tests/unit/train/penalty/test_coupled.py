"""The batched penalty against an obviously right loop over pairs, with autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from tests.support.pulled import LAYOUTS, Weights, chained_plan
from train.distributed.engines.base import Shard
from train.penalty.coupled import Penalty, penalty_coefficient
from train.recipe.recipe import PenaltySection
from train.recipe.sections.penalty import KINDS


def naive_distance(kind: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x.flatten(), y.flatten()
    p, q = F.softmax(x, 0), F.softmax(y, 0)
    m = (p + q) / 2
    if kind == "l2":
        return ((x - y) ** 2).sum() ** 0.5
    if kind == "mse":
        return F.mse_loss(x, y)
    if kind == "kl":
        return (q * (q / p).log()).sum()
    if kind == "symmetric_kl":
        return ((q * (q / p).log()).sum() + (p * (p / q).log()).sum()) / 2
    if kind == "js":
        return 0.5 * ((m * (m / p).log()).sum() + (m * (m / q).log()).sum())
    return 1 - (x @ y) / (x.norm() * y.norm())


def naive_slice(weights: Weights, layout: HeadLayout, unit: tuple[int, int], projection: str):
    layer, index = unit
    weight = weights.parameters[layout.parameter_name(layer, projection)]
    group = layout.heads // layout.kv_heads
    width = layout.head_dim * (1 if projection in "kv" else group)
    span = slice(index * width, (index + 1) * width)
    return weight[:, span] if projection == "o" else weight[span]


def naive_penalty(
    weights: Weights, layout: HeadLayout, plan: SharingPlan, kind: str
) -> torch.Tensor:
    total = torch.zeros(())
    for tie in plan.ties:
        for projection in tie.projections:
            x = naive_slice(weights, layout, tie.target, projection)
            y = naive_slice(weights, layout, tie.source, projection)
            total = total + naive_distance(kind, x, y)
    return total / len(plan.ties)


def subsets() -> list[tuple[str, ...]]:
    return [tuple(p for i, p in enumerate(PROJECTIONS) if mask >> i & 1) for mask in range(1, 16)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_value_and_gradient_equal_a_loop_over_pairs(name: str, kind: str, sharded: bool) -> None:
    layout = LAYOUTS[name]
    for projections in subsets():
        plan = chained_plan(layout, projections)
        expected, batched = Weights(layout), Weights(layout)
        batched.sharded = sharded  # of one rank: the code that every sharded engine runs
        value = naive_penalty(expected, layout, plan, kind)
        (0.7 * value).backward()
        # A chunk of two pairs: several chunks, some with one pair.
        chunk = 4 * layout.unit_parameters("q")
        result = Penalty(plan, layout, kind, chunk_elements=chunk).apply(batched, 0.7)
        assert result.value == pytest.approx(value.item(), rel=1e-5, abs=1e-7)
        for key, gradient in expected.gradients().items():
            torch.testing.assert_close(
                batched.gradients()[key], gradient, rtol=1e-4, atol=1e-7, msg=f"{key} {projections}"
            )


def test_gradient_is_added_to_what_is_there_and_measuring_adds_none() -> None:
    layout = LAYOUTS["gqa"]
    plan = chained_plan(layout, ("q", "o"))
    once, twice = Weights(layout), Weights(layout)
    penalty = Penalty(plan, layout)
    penalty.apply(once, 1.0)
    penalty.apply(twice, 1.0)
    penalty.apply(twice, None)
    penalty.apply(twice, 1.0)
    for key, gradient in once.gradients().items():
        torch.testing.assert_close(twice.gradients()[key], 2 * gradient)


def test_distance_and_cosine_of_each_pair_and_projection() -> None:
    layout = LAYOUTS["gqa"]
    plan = SharingPlan(
        (HeadTie((2, 1), (0, 0), ("q", "v")), HeadTie((3, 0), (1, 1), ("v",))), released=False
    )
    weights = Weights(layout)
    result = Penalty(plan, layout, "kl").apply(weights, None)
    assert result.distance.shape == result.cosine.shape == (2, 2)
    assert torch.isnan(result.distance[1, 0])
    assert torch.isnan(result.cosine[1, 0])
    x = naive_slice(weights, layout, (3, 0), "v").detach().flatten()
    y = naive_slice(weights, layout, (1, 1), "v").detach().flatten()
    assert result.distance[1, 1] == pytest.approx(float((x - y).norm()), rel=1e-6)
    assert result.cosine[1, 1] == pytest.approx(float(F.cosine_similarity(x, y, dim=0)), rel=1e-5)


def test_equal_units_get_no_gradient_from_l2_and_no_nan_from_any_kind() -> None:
    layout = LAYOUTS["mha"]
    plan = SharingPlan((HeadTie((1, 2), (0, 1), ("q", "o")),))
    for kind in KINDS:
        weights = Weights(layout)
        with torch.no_grad():
            for projection in ("q", "o"):
                source = naive_slice(weights, layout, (0, 1), projection).clone()
                naive_slice(weights, layout, (1, 2), projection).copy_(source)
        result = Penalty(plan, layout, kind).apply(weights, 1.0)
        assert result.value == pytest.approx(0, abs=1e-6)
        for gradient in weights.gradients().values():
            assert float(gradient.abs().max()) <= 1e-6, kind
            if kind == "l2":
                assert not gradient.any()


def test_projections_of_the_recipe_replace_those_of_the_ties() -> None:
    layout = LAYOUTS["mha"]
    shared = SharingPlan((HeadTie((2, 0), (0, 1), ("q", "k", "v", "o")),))
    pulled = SharingPlan((HeadTie((2, 0), (0, 1), ("q", "k")),))
    a = Penalty(shared, layout, projections=["q", "k"])
    assert a.projections == ("q", "k")
    assert a.apply(Weights(layout), None).value == pytest.approx(
        float(naive_penalty(Weights(layout), layout, pulled, "l2").detach()), rel=1e-6
    )


def test_a_target_tied_twice_is_pulled_to_each_source_by_its_own_projections() -> None:
    layout = LAYOUTS["mha"]
    plan = SharingPlan((HeadTie((2, 0), (0, 1), ("q",)), HeadTie((2, 0), (1, 1), ("v",))))
    for projections in (None, ["q", "v"]):
        result = Penalty(plan, layout, projections=projections).apply(Weights(layout), None)
        assert torch.isnan(result.distance).tolist() == [[False, True], [True, False]]


def test_a_frozen_projection_cannot_be_pulled() -> None:
    layout = LAYOUTS["mha"]
    weights = Weights(layout)
    del weights.parameters[layout.parameter_name(0, "k")]
    plan = SharingPlan((HeadTie((2, 0), (0, 1), ("k",)),))
    with pytest.raises(PostshareError, match=r"layers\.0\.self_attn\.k_proj.*frozen"):
        Penalty(plan, layout).apply(weights, 1.0)


@dataclass
class SlicedShard(Shard):
    gradient: torch.Tensor

    def read_gradient(self) -> torch.Tensor:
        return self.gradient.clone()

    def write_gradient(self, gradient: torch.Tensor) -> None:
        self.gradient.copy_(gradient)


@pytest.mark.parametrize("kind", ["l2", "mse", "js"])
def test_ranks_that_keep_whole_gradients_all_add_the_same(kind: str) -> None:
    """Three ranks with uneven, partly empty ranges, run in lock step without a process group."""
    layout = LAYOUTS["gqa"]
    plan = chained_plan(layout, PROJECTIONS)
    whole = Weights(layout)
    expected = Penalty(plan, layout, kind).apply(whole, 1.0)
    parameters = Weights(layout).parameters
    cuts = {name: [0, 7, p.numel() * 2 // 3 + 1, p.numel()] for name, p in parameters.items()}
    cuts["model.layers.1.self_attn.o_proj.weight"] = [0, 0, 576, 576]
    gathered: dict[int, list[torch.Tensor]] = {}

    class Rank:
        world = 3
        sharded = whole_gradients = True
        device = torch.device("cpu")

        def __init__(self, rank: int) -> None:
            self.calls, self.rank = 0, rank
            self.ranges = {
                name: SlicedShard(
                    name,
                    p.shape,
                    cuts[name][rank],
                    cuts[name][rank + 1],
                    p.detach().view(-1)[cuts[name][rank] : cuts[name][rank + 1]],
                    torch.zeros(p.numel()),
                )
                for name, p in parameters.items()
            }

        def shards(self, names: list[str]) -> dict[str, Shard]:
            return {name: self.ranges[name] for name in names}

        def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
            parts = gathered.setdefault(self.calls, [])
            if recording:
                parts.append(tensor.clone())
            else:
                tensor.copy_(torch.stack(parts).sum(0))
            self.calls += 1
            return tensor

    recording = True
    for rank in range(3):
        Penalty(plan, layout, kind).apply(Rank(rank), None)
    recording = False
    ranks = [Rank(rank) for rank in range(3)]
    for one in ranks:
        result = Penalty(plan, layout, kind).apply(one, 1.0)
        assert result.value == pytest.approx(expected.value, rel=1e-5)
        torch.testing.assert_close(result.distance, expected.distance)
        torch.testing.assert_close(result.cosine, expected.cosine)
        slices = sum(layout.unit_parameters(p) for p in PROJECTIONS) * len(plan.ties)
        held = slices * (8 if kind == "js" else 4) + 16 * 4 * len(plan.ties)
        assert result.bytes_moved == 4 * held // 3  # a ring of three
        assert result.bytes_of_all_ranks == 3 * result.bytes_moved
        for name, gradient in whole.gradients().items():
            own = one.ranges[name].gradient.view_as(gradient)
            torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-9)


def test_coefficient_ramps() -> None:
    def at(step: int, schedule: str) -> float:
        section = SimpleNamespace(coefficient=2.0, schedule=schedule, ramp_steps=10)
        return penalty_coefficient(step, section)

    assert penalty_coefficient(0, PenaltySection(coefficient=2.0)) == 2.0
    assert [at(s, "linear") for s in (0, 5, 10, 99)] == [0, 1, 2, 2]
    assert at(0, "cosine") == 0
    assert at(5, "cosine") == pytest.approx(1)
    assert at(2, "cosine") == pytest.approx(1 - math.cos(math.pi / 5))
    assert at(10, "cosine") == 2
