"""The problem of a plan: what a budget asks of units, by arithmetic on a small shape."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from train.estimate.llama_shapes import LlamaShape
from train.planning.check import check_budget
from train.planning.problem import PlanProblem
from train.planning.search.auto_space import possible_structures
from train.recipe.sections import plan
from train.recipe.sections.plan import Budget, PlanSection

SHAPE = LlamaShape(97, 64, 176, 8, 8, 4, 8, 128)
"""8 layers of 4 KV groups of 2 heads."""
SPANS = SharingPlan(spans=(AttentionSpan(2, (3, 4)), AttentionSpan(6, (7,), "kv")))


def problem(structure: SharingPlan | None = None, **section: Any) -> PlanProblem:
    return PlanProblem(PlanSection.model_validate(section), SHAPE, structure or SharingPlan())


@pytest.mark.parametrize(
    ("strategy", "kind", "kept", "count"),
    [("cosine", "tie", (0, 3, 4, 7), 16), ("random", "remove", (0, 2, 3, 4, 6, 7), 8)],
)
def test_followers_keep_their_units_and_spans_lose_none(
    strategy: str, kind: str, kept: tuple[int, ...], count: int
) -> None:
    asked = problem(SPANS, strategy=strategy, action=kind, budget={"heads": 6})
    assert (asked.kind, asked.skipped_layers(kind), asked.units) == (kind, kept, 3)
    assert len(asked.allowed.tied) == 16
    assert len(asked.allowed.removable) == 8
    units = asked.allowed.tied if kind == "tie" else asked.allowed.removable
    assert len(units) == count
    assert not {layer for layer, _ in units} & set(kept)
    assert asked.allowed.followers == {3, 4, 7}


def test_what_a_structure_saves_is_not_asked_of_the_units() -> None:
    asked = problem(strategy="auto", budget={"cache": "-30%"})
    # 2 x 4 KV heads of 8 elements in 8 layers: 512 for a token, a kv span's follower 64 of them.
    assert (asked.remaining.needed, asked.remaining.given) == (154, 0)
    one = asked.within(SharingPlan(spans=(AttentionSpan(6, (7,), "kv"),)))
    assert (one.remaining.needed, one.remaining.given) == (154 - 64, 64)
    three = asked.within(SharingPlan(spans=(AttentionSpan(4, (5, 6, 7), "kv"),)))
    assert (three.remaining.needed, three.remaining.given) == (154 - 192, 192)
    assert one.required is one.remaining
    with pytest.raises(PostshareError, match=r"alone save 37\.50%, which is the 30\.00% asked"):
        _ = three.required


def test_a_share_is_a_number_from_the_recipe_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    parse = plan.parse_share
    monkeypatch.setattr(plan, "parse_share", lambda text: (read.append(text), parse(text))[1])
    asked = problem(strategy="auto", budget={"bytes": "-2.5%"})
    assert asked.budget.share == ("bytes", Fraction(1, 40))
    before = len(read)
    for structure in (SharingPlan(), SPANS, SharingPlan(kv_heads=2)):
        assert asked.within(structure).remaining.counted == asked.budget.counted == "bytes"
    assert len(read) == before
    assert asked.budget.model_dump(mode="json", exclude_none=True) == {"bytes": "-2.5%"}


def test_a_budget_that_was_read_equals_one_that_was_not() -> None:
    used, fresh = Budget(cache="-10%"), Budget(cache="-10%")
    assert used.counted == "cache"
    assert used == fresh
    assert hash(used) == hash(fresh)


@pytest.mark.parametrize("strategy", ["loss", "auto", "magnitude"])
def test_heads_that_no_stock_config_takes_are_refused_by_every_strategy(strategy: str) -> None:
    """Five heads of six beside biases of the MLP; four are a stock Llama."""
    shape = replace(LlamaShape(97, 48, 64, 4, 6, 6, 8, 128), mlp_bias=True)
    action = {} if strategy == "auto" else {"action": "remove"}

    def check(cache: str) -> None:
        section = {"strategy": strategy, "uniform": True, "budget": {"cache": cache}, **action}
        check_budget(PlanProblem(PlanSection.model_validate(section), shape))

    with pytest.raises(PostshareError, match="5 heads do not divide hidden_size 48"):
        check("-16%")
    check("-33%")


def test_structures_of_such_heads_are_tried_where_layers_may_differ() -> None:
    """Five heads of 8 do not divide 48 in the base itself, which nobody asked to be stock."""
    shape = LlamaShape(97, 48, 64, 4, 5, 5, 8, 128)
    section = PlanSection(strategy="auto", budget=Budget(cache="-30%"))
    found = [
        len(possible_structures(PlanProblem(section, replace(shape, mlp_bias=bias))))
        for bias in (False, True)
    ]
    assert found[0] == found[1] > 0
