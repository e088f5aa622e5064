"""Scores, matches and selection against plain loops."""

from __future__ import annotations

import itertools
import re
from math import nan

import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout, unit_view
from sa_models.scores import weight_cosine
from sa_models.scores.weight_cosine import (
    Matches,
    best_matches,
    random_matches,
    unit_scores,
)
from sa_models.search.budget import units_of_heads, units_of_ratio
from sa_models.search.pairs import check_count, make_plan, select_pairs, select_removals
from tests.support.gauge import tiny
from tests.support.in_memory import InMemory


def rows(model: LlamaForCausalLM, layout: HeadLayout, layer: int, unit: int, p: str):
    """A unit's rows by index arithmetic of its own."""
    weight = getattr(model.model.layers[layer].self_attn, f"{p}_proj").weight.detach().double()
    group = layout.heads // layout.kv_heads
    width = layout.head_dim * (group if p in "qo" else 1)
    part = slice(unit * width, (unit + 1) * width)
    return weight[:, part].T if p == "o" else weight[part]


def feature(model: LlamaForCausalLM, layout: HeadLayout, layer: int, unit: int, score: str):
    if score != "softmax":
        return torch.cat([rows(model, layout, layer, unit, p).flatten() for p in score])
    q, k, v = (rows(model, layout, layer, unit, p) for p in "qkv")
    heads = q.split(layout.head_dim)
    return torch.cat([(torch.softmax(head @ k.T, dim=-1) @ v).flatten() for head in heads])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("p", ["q", "k", "v", "o"])
def test_unit_view_is_the_units_rows_and_writes_through(kv_heads: int, p: str) -> None:
    model = tiny(kv_heads, layers=4)
    layout = HeadLayout.from_config(model.config)
    weight = model.get_parameter(layout.parameter_name(1, p)).detach()
    assert tuple(weight.shape) == layout.shape(p)
    view = unit_view(weight, layout, p)
    for unit in range(layout.units):
        torch.testing.assert_close(
            view[unit].double(), rows(model, layout, 1, unit, p), rtol=0, atol=0
        )
    view[0].fill_(7.0)
    assert (rows(model, layout, 1, 0, p) == 7).all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("score", ["q", "k", "v", "qk", "qkv", "softmax"])
def test_scores_and_matches_equal_a_loop_over_pairs(
    kv_heads: int, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of 5 columns and blocks of 3 units: sizes that do not divide.
    layout = HeadLayout.from_config((model := tiny(kv_heads, layers=4)).config)
    column = 4 * layout.layers * layout.units * layout.width("q")
    monkeypatch.setattr(weight_cosine, "CHUNK_BYTES", 5 * column)
    monkeypatch.setattr(weight_cosine, "BLOCK_UNITS", 3)
    calls = []
    scores = unit_scores(
        InMemory(dict(model.named_parameters())), layout, score, lambda *done: calls.append(done)
    )
    assert calls[-1][0] == calls[-1][1] == len(calls)
    units = list(itertools.product(range(layout.layers), range(layout.units)))
    for (i, a), (j, b) in itertools.product(enumerate(units), repeat=2):
        x, y = feature(model, layout, *a, score), feature(model, layout, *b, score)
        assert float(scores[i, j]) == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-6)
    matches = best_matches(scores, layout)
    for layer, unit in units[layout.units :]:
        row = scores[layer * layout.units + unit, : layer * layout.units]
        best = int(row.argmax())
        assert matches.sources[layer, unit].tolist() == list(divmod(best, layout.units))
        assert float(matches.scores[layer, unit]) == float(row[best])


def test_scores_within_1e_6_are_ties_and_the_earliest_wins() -> None:
    layout = HeadLayout(layers=3, hidden_size=8, heads=2, kv_heads=2, head_dim=4)
    scores = torch.zeros(6, 6, dtype=torch.float64)
    scores[4, :4] = torch.tensor([0.1, 0.5 - 5e-7, 0.5, 0.2])
    scores[5, :4] = torch.tensor([0.1, 0.5 - 5e-6, 0.5, 0.2])
    matches = best_matches(scores, layout)
    assert matches.sources[2].tolist() == [[0, 1], [1, 0]]


def matches_of(values: list[list[float]]) -> Matches:
    scores = torch.tensor(values, dtype=torch.float64)
    sources = torch.zeros(*scores.shape, 2, dtype=torch.long)
    return Matches(scores, sources)


def test_the_highest_scores_are_taken_in_ascending_order() -> None:
    layout = HeadLayout(layers=3, hidden_size=8, heads=2, kv_heads=2, head_dim=4)
    matches = matches_of([[nan, nan], [0.3, 0.1], [0.2, 0.3]])
    pairs = select_pairs(matches, layout, 3, "qk")
    # Equal scores keep the published order: the last layer first.
    assert [(p.target, p.score) for p in pairs] == [((2, 0), 0.2), ((2, 1), 0.3), ((1, 0), 0.3)]
    assert all(p.projections == ("q", "k") for p in pairs)
    skipped = select_pairs(matches, layout, 2, "qk", skip_layers=(0, 1))
    assert [p.target for p in skipped] == [(2, 0), (2, 1)]


def test_every_layer_keeps_a_unit_of_those_that_are_removed() -> None:
    """Of three layers with scores: by the scores alone layer 2 would lose both of its units."""
    layout = HeadLayout(layers=4, hidden_size=8, heads=2, kv_heads=2, head_dim=4)
    matches = matches_of([[nan, nan], [0.3, 0.1], [0.9, 0.8], [0.2, 0.7]])
    taken = {count: select_removals(matches, layout, count) for count in (1, 2, 3)}
    assert taken == {1: ((2, 0),), 2: ((2, 0), (3, 1)), 3: ((1, 0), (2, 0), (3, 1))}
    assert select_removals(matches, layout, 2, (0, 2)) == ((1, 0), (3, 1))
    says = r"asks for 4 of 8 units, and 3 can be removed \(every layer keeps one, layers \[0\] all"
    with pytest.raises(PostshareError, match=says):
        select_removals(matches, layout, 4)
    with pytest.raises(PostshareError, match=r"and 2 can be removed .*layers \[0, 2\] all"):
        select_removals(matches, layout, 3, (2,))


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_removals_of_a_budget_that_many_layers_could_not_meet(kv_heads: int) -> None:
    """30 layers of three KV groups, as SmolLM2 has, at 30 %; and of one group, which stays."""
    layout = HeadLayout(layers=30, hidden_size=72, heads=9, kv_heads=kv_heads, head_dim=8)
    for seed in range(20):
        matches = random_matches(layout, seed)
        if kv_heads == 1:
            with pytest.raises(PostshareError, match=r"and 0 can be removed .*plan\.action=drop"):
                select_removals(matches, layout, 1)
            continue
        removed = select_removals(matches, layout, 27)
        assert len(set(removed)) == 27
        lost = [sum(at == layer for at, _ in removed) for layer in range(30)]
        assert lost[0] == 0
        assert max(lost) <= 2
        tied = {tie.target for tie in select_pairs(matches, layout, 27, "q")}
        emptied = {layer for layer, _ in tied if sum(at == layer for at, _ in tied) == 3}
        assert len(tied - set(removed)) == len(emptied)


@pytest.mark.parametrize(
    ("ratio", "units", "expected"),
    [(0.3, 64, 19), (0.29, 100, 29), (0.3, 1024, 307), (0.1, 40, 4), (0.57, 100, 57)],
)
def test_ratio_is_floored_in_decimal(ratio: float, units: int, expected: int) -> None:
    layout = HeadLayout(layers=units // 4, hidden_size=16, heads=4, kv_heads=4, head_dim=4)
    assert units_of_ratio(ratio, layout) == expected


def test_a_count_of_heads_may_not_split_a_kv_group() -> None:
    layout = HeadLayout(layers=4, hidden_size=16, heads=4, kv_heads=2, head_dim=4)
    assert units_of_heads(6, layout) == 3
    with pytest.raises(PostshareError, match=r"KV group of 2 heads.* the nearest is 4"):
        units_of_heads(5, layout)


def test_a_ratio_that_cannot_be_met_names_the_highest_that_can() -> None:
    layout = HeadLayout(layers=4, hidden_size=16, heads=4, kv_heads=4, head_dim=4)
    check_count(12, layout)
    with pytest.raises(PostshareError, match=r"13 of 16 units, possible are 1 to 12 .*0\.7500"):
        check_count(13, layout)
    with pytest.raises(PostshareError, match="asks for 0 of 16"):
        check_count(units_of_ratio(0.05, layout), layout)
    many = HeadLayout(layers=30, hidden_size=12, heads=3, kv_heads=3, head_dim=4)
    for each in (layout, many):  # 1 / 90 = 0.01111, of which 0.0111 would be no unit
        with pytest.raises(PostshareError, match="asks for 0 of") as caught:
            check_count(0, each)
        said = re.search(r"ratio between ([\d.]+) and ([\d.]+)", str(caught.value))
        assert said is not None
        assert units_of_ratio(float(said[1]), each) == 1
        check_count(units_of_ratio(float(said[2]), each), each)
    with pytest.raises(PostshareError, match="layer 9"):
        check_count(1, layout, skip_layers=(9,))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_effective_equals_requested(kv_heads: int) -> None:
    model = tiny(kv_heads, layers=6)
    layout = HeadLayout.from_config(model.config)
    scores = unit_scores(InMemory(dict(model.named_parameters())), layout, "qk")
    for ratio in (0.1, 0.3, 0.5, 0.8):
        plan = make_plan(
            best_matches(scores, layout), layout, units_of_ratio(ratio, layout), "qkvo"
        )
        plan.validate(model.config)
        wanted = units_of_ratio(ratio, layout)
        assert plan.savings(model.config).tied_units == wanted
        released = make_plan(
            best_matches(scores, layout),
            layout,
            units_of_ratio(ratio, layout),
            "qkvo",
            released=True,
        )
        released.validate(model.config)
        assert {t.target for t in released.ties} == {t.target for t in plan.ties}


def test_random_control_is_seeded_earlier_and_even() -> None:
    layout = HeadLayout(layers=40, hidden_size=64, heads=16, kv_heads=16, head_dim=4)
    a, b = random_matches(layout, seed=1), random_matches(layout, seed=1)
    assert torch.equal(a.sources, b.sources)
    assert not torch.equal(a.sources, random_matches(layout, seed=2).sources)
    layers = torch.arange(1, 40)[:, None].expand(39, 16)
    assert (a.sources[1:, :, 0] < layers).all()
    assert (a.sources[1:] >= 0).all()
    # Evenly drawn sources lie in the middle of the earlier layers: (l - 1) / 2 on average.
    position = (a.sources[1:, :, 0] + 0.5) / layers
    assert float(position.mean()) == pytest.approx(0.5, abs=0.05)
