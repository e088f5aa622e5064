"""The objective of strategy auto: what a server pays, counted by hand, and what it decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sa_models.heads import HeadLayout
from sa_models.plan import HeadTie, SharingPlan
from sa_models.savings import llama_parameters
from sa_models.spans import AttentionSpan
from tests.support.reference import dense
from train.planning.basis import saving_plan
from train.planning.problem import PlanProblem
from train.planning.search.auto_space import ANY, FULL, REMOVALS, check_auto, unit_spaces
from train.planning.search.objective import (
    Payment,
    cost,
    most_rise,
    objective_sentence,
    rise_for,
    saved_share,
)
from train.recipe.sections.plan import PlanSection

CONFIG = dense("gqa").config
LAYOUT = HeadLayout.from_config(CONFIG)
UNIT = sum(map(LAYOUT.unit_parameters, "qkvo"))
REMOVED = SharingPlan(removed=((3, 0), (4, 1)))
TIED = SharingPlan(ties=(HeadTie((3, 0), (1, 1), ("q", "k", "v", "o")),))


def problem(objective: str, **more: object) -> PlanProblem:
    section = {"strategy": "auto", "objective": objective, "budget": {"bytes": "-2%"}} | more
    return PlanProblem(PlanSection.model_validate(section), CONFIG)


def test_a_payment_is_what_is_stored_held_and_read() -> None:
    positions = min(4096, CONFIG.max_position_embeddings)
    token = 2 * LAYOUT.layers * LAYOUT.kv_heads * LAYOUT.head_dim
    dense_payment = Payment.of(SharingPlan(), CONFIG, 2)
    assert dense_payment.weights == 2 * llama_parameters(CONFIG)
    assert dense_payment.cache == 2 * 8 * positions * token
    embeddings = 0 if CONFIG.tie_word_embeddings else CONFIG.vocab_size * CONFIG.hidden_size
    assert dense_payment.read == dense_payment.weights + dense_payment.cache - 2 * embeddings
    gone = Payment.of(REMOVED, CONFIG, 2)
    cache = 2 * 8 * positions * 2 * 2 * LAYOUT.head_dim  # k and v of two KV heads
    assert dense_payment.weights - gone.weights == 2 * 2 * UNIT
    assert dense_payment.cache - gone.cache == cache
    assert dense_payment.read - gone.read == 2 * 2 * UNIT + cache
    assert gone.counted("all") == gone.weights + gone.cache + gone.read


@pytest.mark.parametrize("objective", ["cache", "speed"])
def test_ties_and_shared_bases_save_neither_cache_nor_time(objective: str) -> None:
    basis = saving_plan(CONFIG, 2 * UNIT)
    assert basis is not None
    assert saved_share(problem(objective), TIED) == 0
    assert saved_share(problem(objective), basis) <= 0
    span = SharingPlan(spans=(AttentionSpan(2, (3,), "kv"),))
    for plan in (REMOVED, span, SharingPlan(kv_heads=1)):
        assert saved_share(problem(objective), plan) > 0


@pytest.mark.parametrize("rise", [-0.3, 0.0, 0.2])
def test_the_rise_that_comes_to_a_cost(rise: float) -> None:
    for saved in (0.02, 0.5, 1.0):
        assert most_rise(rise_for(rise, saved), saved) == pytest.approx(rise, abs=1e-15)


def test_plans_are_compared_by_the_rise_for_what_is_saved() -> None:
    alone, more = SharingPlan(removed=((3, 0),)), REMOVED  # half as much, in all that is counted
    for objective in ("cache", "speed", "all"):
        asked = problem(objective)
        assert cost(asked, more, 0.2) == pytest.approx(cost(asked, alone, 0.1))
        assert cost(asked, more, 0.19) < cost(asked, alone, 0.1)
        assert cost(asked, more, -0.1) < cost(asked, alone, -0.1) < 0
        assert cost(asked, TIED, -0.1) <= 0 < cost(asked, alone, 0.01)
    assert cost(problem("cache"), TIED, 0.001) == float("inf")
    # Of bytes the budget asks the same of all: the loss decides.
    assert cost(problem("bytes"), more, 0.2) == 0.2


def test_what_the_recipe_s_own_structure_saves_is_no_merit_of_a_plan() -> None:
    structure = SharingPlan(spans=(AttentionSpan(2, (3,), "kv"),))
    asked = replace(problem("cache"), structure=structure)
    assert saved_share(asked, structure) == 0
    token = LAYOUT.layers * LAYOUT.kv_heads
    both = replace(structure, removed=((5, 0),))
    assert saved_share(asked, both) == pytest.approx(1 / (token - LAYOUT.kv_heads))


def test_units_are_tied_for_bytes_alone() -> None:
    tied = {name for name, space in unit_spaces(problem("bytes")).items() if space.targets}
    assert tied == {FULL, ANY}
    for objective in ("cache", "speed", "all"):
        spaces = unit_spaces(problem(objective))
        assert REMOVALS in spaces
        assert {(space.targets, tuple(space.shares)) for space in spaces.values()} == {((), ())}
    assert PlanSection.model_fields["objective"].default == "all"
    with pytest.raises(Exception, match=r"removals \(ties: plan.objective=bytes\), spans and KV"):
        check_auto(problem("all", budget={"bytes": "-60%"}))


def test_the_sentence_counts() -> None:
    before, after = (Payment.of(p, CONFIG, 4).cache for p in (SharingPlan(), REMOVED))
    said = objective_sentence("cache", REMOVED, CONFIG, 4)
    assert f"{after:,} bytes, {1 - after / before:.1%} less than the {before:,}" in said
    assert said.startswith("Objective cache: the KV cache of 8 requests of ")
