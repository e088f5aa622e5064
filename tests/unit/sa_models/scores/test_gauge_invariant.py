"""Gauge-invariant scores against plain loops and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout, unit_view
from sa_models.scores import weight_cosine
from sa_models.scores.gauge_invariant import FoldedNorm, aligned_scores
from sa_models.scores.registry import OF_WEIGHTS, weight_scores, weight_terms
from sa_models.scores.significance import Chance, chance
from sa_models.scores.weight_cosine import unit_scores
from tests.support.gauge import (
    HEAD_DIM,
    HIDDEN,
    change_gauge_,
    slices,
    tiny,
    tokens,
)
from tests.support.in_memory import InMemory

ALIGNED = ("qk_aligned", "vo", "qkvo_aligned")


def reader(model) -> InMemory:
    return InMemory(dict(model.named_parameters()))


def layout_of(model) -> HeadLayout:
    return HeadLayout.from_config(model.config)


def balanced(unit: dict[str, list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """For every plane, the row pairs (2, hidden) of the query heads and the key, at equal norms."""
    result = []
    for i in range(HEAD_DIM // 2):
        pair = [i, i + HEAD_DIM // 2]
        q, k = [head[pair] for head in unit["q"]], unit["k"][0][pair]
        norm_q = math.sqrt(sum(float(rows.square().sum()) for rows in q))
        norm_k = float(k.norm())
        r = math.sqrt(norm_k / norm_q)
        result.append([*(rows * r for rows in q), k / r])
    return result


def loop_qk(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> float:
    """The best angle of every plane from its two sums: real and imaginary part of c_i."""
    total, squares = 0.0, [0.0, 0.0]
    for mine, other in zip(balanced(a), balanced(b), strict=True):
        along = sum(float((x * y).sum()) for x, y in zip(mine, other, strict=True))
        across = sum(float(x[0] @ y[1] - x[1] @ y[0]) for x, y in zip(mine, other, strict=True))
        total += math.hypot(along, across)
        for at, rows in enumerate((mine, other)):
            squares[at] += sum(float(x.square().sum()) for x in rows)
    return total / math.sqrt(squares[0] * squares[1])


def loop_vo(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> float:
    def maps(unit: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        return [o.T @ unit["v"][0] for o in unit["o"]]  # (hidden, hidden) of every head

    x, y = torch.stack(maps(a)), torch.stack(maps(b))
    return float((x * y).sum() / x.norm() / y.norm())


LOOPS = {
    "qk_aligned": loop_qk,
    "vo": loop_vo,
    "qkvo_aligned": lambda a, b: (loop_qk(a, b) + loop_vo(a, b)) / 2,
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("score", ALIGNED)
def test_all_pairs_equal_a_loop(kv_heads: int, score: str, monkeypatch) -> None:
    model = tiny(kv_heads)
    layout = layout_of(model)
    # Two planes, or three residual rows, at a time, and blocks of 5 units: nothing divides.
    units = layout.layers * layout.units
    monkeypatch.setattr(
        weight_cosine, "CHUNK_BYTES", 3 * 4 * units * layout.heads_per_unit * HIDDEN
    )
    monkeypatch.setattr(weight_cosine, "BLOCK_UNITS", 5)
    calls = []
    scores = aligned_scores(reader(model), layout, score, lambda *done: calls.append(done))
    assert calls[-1][0] == calls[-1][1]
    every = list(itertools.product(range(layout.layers), range(layout.units)))
    for (i, a), (j, b) in itertools.product(enumerate(every), repeat=2):
        expected = LOOPS[score](slices(model, *a), slices(model, *b))
        assert float(scores[i, j]) == pytest.approx(expected, abs=2e-6)
    torch.testing.assert_close(scores.diagonal(), torch.ones(units, dtype=torch.float64))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_change_of_gauge_changes_raw_scores_only(kv_heads: int) -> None:
    model = tiny(kv_heads)
    layout, ids = layout_of(model), tokens()
    names = [*ALIGNED, "qk", "v"]

    def measure() -> dict[str, torch.Tensor]:
        return {name: weight_scores(reader(model), layout, name) for name in names}

    before, logits = measure(), model(ids).logits
    change_gauge_(model)
    after = measure()
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    for name in ALIGNED:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)
    for name in ("qk", "v"):
        assert (after[name] - before[name]).abs().max() > 0.05


def test_the_closed_form_is_the_best_angle() -> None:
    """Brute force: every plane's angle on a fine grid, at the scale that makes the norms equal."""
    model = tiny(2)
    a, b = slices(model, 2, 1), slices(model, 0, 0)
    grid = torch.arange(0, 2 * math.pi, 2 * math.pi / 20000, dtype=torch.float64)
    best, squares = 0.0, [0.0, 0.0]
    for mine, other in zip(balanced(a), balanced(b), strict=True):
        rotated = torch.zeros_like(grid)
        for x, y in zip(mine, other, strict=True):
            turned = (
                grid.cos()[:, None] * y[0] - grid.sin()[:, None] * y[1],
                grid.sin()[:, None] * y[0] + grid.cos()[:, None] * y[1],
            )
            rotated += turned[0] @ x[0] + turned[1] @ x[1]
        best += float(rotated.max())
        for at, rows in enumerate((mine, other)):
            squares[at] += sum(float(x.square().sum()) for x in rows)
    brute = best / math.sqrt(squares[0] * squares[1])
    scores = aligned_scores(reader(model), layout_of(model), "qk_aligned")
    assert brute == pytest.approx(float(scores[5, 0]), abs=1e-6)


def test_equal_norms_are_the_scale_at_which_a_plane_is_smallest() -> None:
    unit = slices(tiny(2), 1, 0)
    pair = [1, 1 + HEAD_DIM // 2]
    q, k = torch.stack([head[pair] for head in unit["q"]]), unit["k"][0][pair]
    scales = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    sizes = q.square().sum() * scales**2 + k.square().sum() / scales**2
    smallest = sum(float(x.square().sum()) for x in balanced(unit)[1])
    assert smallest == pytest.approx(float(sizes.min()), rel=1e-5)
    assert smallest <= float(sizes.min())


@pytest.mark.parametrize("score", OF_WEIGHTS)
def test_folding_the_gain_is_what_a_model_with_folded_weights_scores(score: str) -> None:
    model, folded = tiny(2), tiny(2)
    ids, compare = tokens(), weight_scores
    with torch.no_grad():
        for layer in folded.model.layers:
            gain = layer.input_layernorm.weight.clone()
            for p in "qkv":
                getattr(layer.self_attn, f"{p}_proj").weight *= gain
            layer.input_layernorm.weight.fill_(1.0)
    torch.testing.assert_close(folded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    layout = layout_of(model)
    expected = compare(reader(folded), layout, score)
    got = compare(FoldedNorm(reader(model)), layout, score)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (compare(reader(model), layout, score) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("score", OF_WEIGHTS)
def test_the_terms_of_a_pair_sum_up_to_its_score(kv_heads: int, score: str) -> None:
    model = tiny(kv_heads)
    layout, folded = layout_of(model), FoldedNorm(reader(model))
    scores = weight_scores(folded, layout, score)
    terms = weight_terms(folded, layout, score)
    for target, source in [((2, 0), (0, 0)), ((1, layout.units - 1), (0, 0)), ((2, 0), (1, 0))]:
        i, j = (unit[0] * layout.units + unit[1] for unit in (target, source))
        assert terms(target, source).score == pytest.approx(float(scores[i, j]), abs=2e-6)


def test_bad_input() -> None:
    model = tiny(2)
    attention = {n: p for n, p in model.named_parameters() if ".self_attn." in n}
    with pytest.raises(PostshareError, match=r"input_layernorm.weight to fold in.*fold_norm=false"):
        unit_scores(FoldedNorm(InMemory(attention)), layout_of(model), "qk")


@pytest.mark.parametrize("score", ["qk", "softmax", "qk_aligned", "vo", "qkvo_aligned"])
def test_a_unit_of_zeros_is_like_no_other(score: str) -> None:
    """Its scores are 0, and those of the others what they are without it."""
    model = tiny(2)
    layout = layout_of(model)
    before = weight_scores(reader(model), layout, score)
    removed = 1 * layout.units + 1
    with torch.no_grad():
        for p in "qkvo":
            weight = model.get_parameter(layout.parameter_name(1, p))
            unit_view(weight, layout, p)[1] = 0
    after = weight_scores(reader(model), layout, score)
    assert (after[removed] == 0).all()
    assert (after[:, removed] == 0).all()
    others = [unit for unit in range(len(before)) if unit != removed]
    assert torch.equal(after[others][:, others], before[others][:, others])
    terms = weight_terms(reader(model), layout, score)
    for pair in (((1, 1), (0, 0)), ((2, 0), (1, 1))):
        assert chance(terms(*pair), 4) == Chance(0.0, 0.0, 1.0, 1.0)
