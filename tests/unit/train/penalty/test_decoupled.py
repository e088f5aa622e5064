"""Decoupled penalty and progressive replacement against plain loops, brute force and trainings."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.plan import HeadTie, SharingPlan
from tests.support import tiny
from tests.support.pulled import LAYOUTS, Weights, chained_plan, star_plan
from train.common.signals import TrainingStopped
from train.penalty.decoupled import Pull, left
from train.recipe.recipe import PenaltySection
from train.recipe.rules import unfinished
from train.tracking.metrics_log import read_rows
from train.training.loop import train

RATE = 0.01  # of learning, in the calls below


def decoupled(coefficient: float) -> PenaltySection:
    return PenaltySection(mode="decoupled", coefficient=coefficient, loss_weights=(1.0, 1.0))


def progressive(steps: int, schedule: Any = "linear") -> PenaltySection:
    return PenaltySection(mode="progressive", schedule=schedule, ramp_steps=steps)


def unit(
    values: dict[str, torch.Tensor], layout: HeadLayout, place: tuple[int, int], p: str
) -> torch.Tensor:
    """A view of a unit's rows, or columns of o; written out anew."""
    width = layout.head_dim * (1 if p in "kv" else layout.heads // layout.kv_heads)
    rows = slice(place[1] * width, (place[1] + 1) * width)
    weight = values[layout.parameter_name(place[0], p)]
    return weight[:, rows] if p == "o" else weight[rows]


def values_of(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in weights.parameters.items()}


def naive_decoupled(
    weights: Weights, layout: HeadLayout, plan: SharingPlan, tau: float
) -> tuple[dict[str, torch.Tensor], set[tuple[tuple[int, int], str]]]:
    """The documented step, family by family, and the (target, projection) that have merged."""
    old, new, merged = values_of(weights), values_of(weights), set()
    for source, p in {(tie.source, p) for tie in plan.ties for p in tie.projections}:
        targets = [t.target for t in plan.ties if t.source == source and p in t.projections]
        y = unit(old, layout, source, p).double()
        differences, shrunk = [], []
        for target in targets:
            d = unit(old, layout, target, p).double() - y
            rms = d.square().mean().sqrt()
            factor = max(0.0, 1 - tau / float(rms))
            differences.append(d)
            shrunk.append(factor * d)
            if factor == 0:
                merged.add((target, p))
        members = len(targets) + 1
        mean = y + sum(differences) / members
        moved = mean - sum(shrunk) / members
        unit(new, layout, source, p).copy_(moved)
        for target, d in zip(targets, shrunk, strict=True):
            unit(new, layout, target, p).copy_(moved + d)
    return new, merged


# --- the proximal step ----------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_decoupled_step_equals_a_loop_over_families(name: str, sharded: bool) -> None:
    layout = LAYOUTS[name]
    for projections in (("q",), ("k", "v"), ("o",), PROJECTIONS):
        plan = star_plan(layout, projections)
        weights = Weights(layout)
        weights.sharded = sharded  # of one rank: the code that every sharded engine runs
        # Random units lie about sqrt(2) apart: this tau is between their distances.
        distances = [
            float((unit(values_of(weights), layout, t.target, p) - unit(
                values_of(weights), layout, t.source, p)).square().mean().sqrt())
            for t in plan.ties for p in t.projections
        ]  # fmt: skip
        tau = sorted(distances)[len(distances) // 2] + 1e-4
        expected, merged = naive_decoupled(weights, layout, plan, tau)
        assert 0 < len(merged) < len(distances)
        chunk = 4 * layout.unit_parameters("q")  # smaller than a family
        pull = Pull(plan, layout, decoupled(tau / RATE), chunk_elements=chunk)
        result = pull.apply(weights, 0, RATE)
        got = values_of(weights)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=key)
        for row, tie in enumerate(plan.ties):
            for column, p in enumerate(pull.penalty.projections):
                x, y = (unit(got, layout, place, p) for place in (tie.target, tie.source))
                assert torch.equal(x, y) == ((tie.target, p) in merged)
                apart = float((x - y).norm())
                assert result.distance[row, column] == pytest.approx(apart, rel=1e-5)
                assert (result.distance[row, column] == 0) == ((tie.target, p) in merged)
                cosine = torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)
                assert result.cosine[row, column] == pytest.approx(float(cosine), abs=1e-5)
        total = float(result.distance.nansum())
        assert result.value == pytest.approx(total / len(plan.ties), rel=1e-5)
        tied = {(t.target, p) for t in plan.ties for p in t.projections}
        tied |= {(t.source, p) for t in plan.ties for p in t.projections}
        before = values_of(Weights(layout))
        for layer in range(layout.layers):
            for index in range(layout.units):
                for p in PROJECTIONS:
                    if ((layer, index), p) not in tied:
                        one, other = (unit(v, layout, (layer, index), p) for v in (got, before))
                        assert torch.equal(one, other)


@pytest.mark.parametrize("tau", [0.3, 5.0])
def test_a_pair_s_step_minimises_what_it_says(tau: float) -> None:
    """Brute force: nothing near or far is better, for the difference and for the two units."""
    layout = LAYOUTS["gqa"]
    plan = SharingPlan((HeadTie((2, 1), (0, 0), ("k",)),))
    weights = Weights(layout)
    places = (2, 1), (0, 0)
    before = [unit(values_of(weights), layout, at, "k").double() for at in places]
    Pull(plan, layout, decoupled(tau / RATE)).apply(weights, 0, RATE)
    after = [unit(values_of(weights), layout, at, "k").double() for at in places]
    frobenius = tau * math.sqrt(before[0].numel())

    def of_difference(d: torch.Tensor) -> float:
        first = before[0] - before[1]
        return float(0.5 * (d - first).square().sum() + frobenius * d.norm())

    def of_units(x: torch.Tensor, y: torch.Tensor) -> float:
        way = (x - before[0]).square().sum() + (y - before[1]).square().sum()
        return float(0.5 * way + 0.5 * frobenius * (x - y).norm())

    best = of_difference(after[0] - after[1]), of_units(*after)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(200):
            a, b = (
                size * torch.randn(before[0].shape, generator=generator, dtype=torch.float64)
                for _ in range(2)
            )
            assert of_difference(after[0] - after[1] + a) > best[0]
            assert of_units(after[0] + a, after[1] + b) > best[1]
    steps = torch.linspace(0, 1.2, 1201, dtype=torch.float64)
    along = [of_difference(step * (before[0] - before[1])) for step in steps]
    assert min(along) == pytest.approx(best[0], rel=1e-5)
    assert (best[0] == of_difference(torch.zeros_like(before[0]))) == (tau == 5.0)


def test_equal_units_stay_equal_to_the_sign_of_a_zero() -> None:
    layout = LAYOUTS["mha"]
    plan = star_plan(layout, ("v", "o"))
    for section in (decoupled(1e6), progressive(1)):
        weights = Weights(layout)
        with torch.no_grad():
            weights.parameters[layout.parameter_name(0, "v")].fill_(-0.0)
            weights.parameters[layout.parameter_name(3, "v")].fill_(-0.0)
        Pull(plan, layout, section).apply(weights, 0, RATE)
        got = values_of(weights)
        for tie in plan.ties:
            for p in tie.projections:
                x, y = (unit(got, layout, at, p) for at in (tie.target, tie.source))
                bits = [one.contiguous().view(torch.int32) for one in (x, y)]
                assert torch.equal(*bits), (tie, p)


def test_without_a_coefficient_nothing_moves_and_all_is_measured() -> None:
    layout = LAYOUTS["gqa"]
    plan = star_plan(layout, ("q", "o"))
    weights = Weights(layout)
    ramped = PenaltySection(mode="decoupled", schedule="linear", ramp_steps=4)
    result = Pull(plan, layout, ramped).apply(weights, 0, RATE)
    for name, value in values_of(Weights(layout)).items():
        assert torch.equal(weights.parameters[name], value)
    assert result.value > 0
    assert float(result.distance.min()) > 0


def test_a_weight_that_is_not_a_number_is_no_merged_pair() -> None:
    layout = LAYOUTS["mha"]
    weights = Weights(layout)
    with torch.no_grad():
        weights.parameters[layout.parameter_name(3, "q")][0, 0] = math.nan
    result = Pull(star_plan(layout, ("q",)), layout, decoupled(1e6)).apply(weights, 0, RATE)
    assert math.isnan(result.value)


def test_chains_are_refused() -> None:
    layout = LAYOUTS["mha"]
    with pytest.raises(PostshareError, match=r"chains.*plan\.strategy=cosine"):
        Pull(chained_plan(layout, ("q",)), layout, decoupled(1.0))


# --- progressive replacement ----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_targets_lie_where_the_schedule_says(schedule: str) -> None:
    """Without an optimizer in between: a fraction of the first distance, then none."""
    layout = LAYOUTS["gqa"]
    plan = star_plan(layout, PROJECTIONS)
    weights, first = Weights(layout), values_of(Weights(layout))
    pull = Pull(plan, layout, progressive(5, schedule))
    for step in range(7):
        pull.apply(weights, step, RATE)
        done = min(1, (step + 1) / 5)
        remaining = 1 - done if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
        assert left(step + 1, pull.section) == pytest.approx(remaining, abs=1e-12)
        got = values_of(weights)
        for tie in plan.ties:
            for p in PROJECTIONS:
                x, y = (unit(first, layout, at, p) for at in (tie.target, tie.source))
                assert torch.equal(unit(got, layout, tie.source, p), y)
                expected = y + remaining * (x - y)
                target = unit(got, layout, tie.target, p)
                torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-6)
                if step >= 4:
                    assert torch.equal(target, y)


def test_what_the_optimizer_moves_shrinks_with_the_rest_and_later_is_shared() -> None:
    layout = LAYOUTS["mha"]
    plan = SharingPlan(tuple(HeadTie((t, 0), (0, 1), ("k",)) for t in (1, 2)))
    weights = Weights(layout)
    pull = Pull(plan, layout, progressive(2))
    places = [(0, 1), (1, 0), (2, 0)]
    expected = [unit(values_of(weights), layout, at, "k").double() for at in places]
    for step in range(4):
        with torch.no_grad():
            for index, at in enumerate(places):
                move = (index + 1) * 0.1 * (step + 1)
                unit(weights.parameters, layout, at, "k").add_(move)
                expected[index] = expected[index] + move
        if step < 2:
            factor = (1 - (step + 1) / 2) / (1 - step / 2)
            for index in (1, 2):
                expected[index] = expected[0] + factor * (expected[index] - expected[0])
        else:
            expected = [sum(expected) / 3] * 3
        pull.apply(weights, step, RATE)
        got = [unit(values_of(weights), layout, at, "k") for at in places]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
        assert (torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])) == (step > 0)


# --- in a training --------------------------------------------------------------------------------


def pairs_in(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    weights = load_file(folder / "weights" / "model.safetensors")
    layout = HeadLayout(layers=2, hidden_size=32, heads=4, kv_heads=4, head_dim=8)
    return [
        (unit(weights, layout, tie.target, p), unit(weights, layout, tie.source, p))
        for tie in tiny.PLAN.ties
        for p in tie.projections
    ]


MODES = {
    # Tau is twice the learning rate, by about which Adam moves an element.
    "decoupled": {"mode": "decoupled", "coefficient": 4.0},
    "progressive": {"mode": "progressive", "schedule": "cosine", "ramp_steps": 4},
}


@pytest.mark.parametrize("merge", ["copy", "mean"])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_merged_pairs_train_on_and_materializing_changes_nothing(
    tmp_path: Path, mode: str, merge: Any
) -> None:
    recipe = tiny.recipe(tmp_path, MODES[mode], steps=6, schedule="constant")
    job = tiny.job(recipe)
    train(job, recipe)
    rows = read_rows(tmp_path / "metrics.jsonl")
    merged = [row["pairs_merged"] for row in rows]
    if mode == "progressive":
        assert merged == [0, 0, 0, 2, 2, 2]
    else:
        assert (merged[0], merged[-2:]) == (0, [2, 2])
    assert (rows[-1]["penalty"], rows[-1]["pair_distance_worst"]) == (0, 0)
    assert rows[-1]["pair_cosine_worst"] == pytest.approx(1, abs=1e-5)
    factor = 0.5 if mode == "decoupled" else 1.0
    assert all(row["total_loss"] == pytest.approx(factor * row["lm_loss"]) for row in rows)
    assert all(torch.equal(x, y) for x, y in pairs_in(tmp_path))
    # The shared units have gone on training since they became equal.
    before = tiny.recipe(tmp_path / "shorter", MODES[mode], steps=5, schedule="constant")
    train(tiny.job(before), before)
    assert all(torch.equal(x, y) for x, y in pairs_in(before.folder))
    assert not torch.equal(pairs_in(before.folder)[0][0], pairs_in(tmp_path)[0][0])

    parameters = dict(job.model.named_parameters())
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    materialize_(parameters, HeadLayout.from_config(job.model.config), tiny.PLAN, merge)
    for name, value in trained.items():
        assert torch.equal(parameters[name].view(torch.int32), value.view(torch.int32)), name


def test_a_penalty_of_weight_0_changes_no_bit(tmp_path: Path) -> None:
    off = {"mode": "decoupled", "loss_weights": [1.0, 0.0]}
    without = tiny.recipe(tmp_path / "without", steps=4)
    train(tiny.job(without, plan=None), without)
    recipe = tiny.recipe(tmp_path / "off", off, steps=4)
    train(tiny.job(recipe), recipe)
    mine, theirs = (
        load_file(folder / "weights" / "model.safetensors")
        for folder in (recipe.folder, without.folder)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_stopped_and_resumed_it_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def recipe(name: str) -> Any:
        return tiny.recipe(tmp_path / name, MODES[mode], steps=6)

    train(tiny.job(recipe("unstopped")), recipe("unstopped"))
    original = Pull.apply

    def apply(self: Pull, engine: Any, step: int, rate: float) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, engine, step, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Pull, "apply", apply)
        with pytest.raises(TrainingStopped, match=r"step 4 of 6"):
            train(tiny.job(recipe("stopped")), recipe("stopped"))
    train(tiny.job(recipe("stopped"), model=tiny.model(seed=9)), recipe("stopped"))
    assert tiny.curve(tmp_path / "stopped") == tiny.curve(tmp_path / "unstopped")
    mine, theirs = (
        load_file(tmp_path / name / "weights" / "model.safetensors")
        for name in ("stopped", "unstopped")
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "words"),
    [
        ({"mode": "decoupled", "kind": "mse"}, r"kind mse has no such step"),
        ({"mode": "progressive", "kind": "js", "schedule": "linear", "ramp_steps": 2}, "kind js"),
        ({"mode": "progressive"}, r"set ramp_steps >= 1 and schedule"),
        (
            {**MODES["progressive"], "coefficient": 2.0},
            r"no loss to weigh, so coefficient has no effect",
        ),
        (
            {**MODES["progressive"], "loss_weights": [1.0, 1.0]},
            r"loss_weights has no effect",
        ),
        (
            {**MODES["progressive"], "ramp_steps": 7},
            r"takes ramp_steps 7 of 6 steps.*set penalty\.ramp_steps=6",
        ),
        ({"mode": "soft"}, r"penalty\.mode"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, penalty: dict[str, Any], words: str
) -> None:
    with pytest.raises(PostshareError, match=words):
        tiny.recipe(tmp_path, penalty)


def test_released_chains_are_refused_with_the_recipe(tmp_path: Path) -> None:
    from train.recipe.recipe import validate

    data = tiny.recipe(tmp_path, MODES["decoupled"]).model_dump(mode="json")
    data["plan"]["strategy"] = "released"
    with pytest.raises(PostshareError, match=r"chains of plan\.strategy released"):
        validate(data)


def test_epochs_are_counted_before_a_replacement_is_found_too_long() -> None:
    assert unfinished(progressive(10), 10) is None
    assert "of 9 steps" in str(unfinished(progressive(10), 9))
    assert unfinished(decoupled(1.0), 1) is None
