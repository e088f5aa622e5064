"""The code of docs/extending.md, run in the modules that it says it goes into."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from sa_models.heads import HeadLayout
from sa_models.scores import weight_cosine
from sa_models.scores.registry import OF_WEIGHTS, WeightScore, weight_scores, weight_terms
from tests.support.in_memory import InMemory
from tests.support.pages import DOCS, blocks
from tests.support.pulled import LAYOUTS, Weights, star_plan
from train.penalty import distances
from train.penalty.coupled import Penalty
from train.recipe.sections.penalty import KINDS
from train.training import optimizer

PAGE = (DOCS / "extending.md").read_text()
PENALTY, SCORE, SCHEDULER = (block.code for block in blocks(DOCS / "extending.md", "python"))


def unit_slice(
    weights: Weights, layout: HeadLayout, unit: tuple[int, int], projection: str
) -> torch.Tensor:
    """By indices alone, without unit_view."""
    layer, index = unit
    weight = weights.parameters[layout.parameter_name(layer, projection)]
    rows = layout.head_dim * (layout.heads // layout.kv_heads if projection in "qo" else 1)
    at = slice(index * rows, (index + 1) * rows)
    return weight[:, at] if projection == "o" else weight[at]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_penalty_is_the_divergence_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    assert PENALTY.startswith("# train/penalty/distances.py\n")
    assert len(PENALTY.splitlines()) < 20
    module = dict(vars(distances))
    exec(PENALTY, module)
    monkeypatch.setattr(distances, "ReverseKL", module["ReverseKL"], raising=False)
    monkeypatch.setitem(KINDS, "reverse_kl", "train.penalty.distances:ReverseKL")
    assert '"reverse_kl": "train.penalty.distances:ReverseKL",' in PAGE
    layout = LAYOUTS["gqa"]
    plan = star_plan(layout, ("q", "v", "o"))
    expected, pulled = Weights(layout), Weights(layout)
    total = torch.zeros(())
    for tie in plan.ties:
        for projection in tie.projections:
            x, y = (
                unit_slice(expected, layout, unit, projection).flatten().log_softmax(0)
                for unit in (tie.target, tie.source)
            )
            total = total + F.kl_div(y, x, reduction="sum", log_target=True)  # KL(P || Q)
    value = total / len({(tie.target, tie.source) for tie in plan.ties})
    (0.7 * value).backward()
    pulled.sharded = sharded
    result = Penalty(plan, layout, "reverse_kl").apply(pulled, 0.7)  # type: ignore[arg-type]
    assert result.value == pytest.approx(value.item(), rel=1e-5)
    assert value.item() > 0.1
    for name, gradient in expected.gradients().items():
        torch.testing.assert_close(pulled.gradients()[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", sorted(LAYOUTS))
def test_the_score_is_the_cosine_of_every_two_units(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SCORE.startswith("# sa_models/scores/weight_cosine.py\n")
    assert len(SCORE.splitlines()) < 20
    module = dict(vars(weight_cosine))
    exec(SCORE, module)
    monkeypatch.setattr(weight_cosine, "output_columns", module["output_columns"], raising=False)
    (name, entry) = re.search(r'"(o)": (WeightScore\(.*?\)),\n', PAGE, re.DOTALL).groups()  # type: ignore[union-attr]
    monkeypatch.setitem(OF_WEIGHTS, name, eval(entry, {"WeightScore": WeightScore}))
    layout = LAYOUTS[shape]
    weights = Weights(layout)
    reader = InMemory(weights.parameters)
    scores, terms = weight_scores(reader, layout, "o"), weight_terms(reader, layout, "o")
    units = [(layer, unit) for layer in range(layout.layers) for unit in range(layout.units)]
    for row, one in enumerate(units):
        for column, other in enumerate(units):
            a, b = (unit_slice(weights, layout, u, "o").reshape(-1) for u in (one, other))
            expected = F.cosine_similarity(a, b, dim=0).item()
            assert scores[row, column].item() == pytest.approx(expected, abs=1e-5)
            assert terms(one, other).score == pytest.approx(expected, abs=1e-5)


def test_the_scheduler_goes_on_where_the_warm_up_ends() -> None:
    assert SCHEDULER.startswith("# train/training/optimizer.py\n")
    module = dict(vars(optimizer))
    exec(SCHEDULER, module)
    factors = [module["inverse_sqrt"](step, 4) for step in (3, 4, 15, 63)]
    assert factors == pytest.approx([1.0, math.sqrt(4 / 5), 0.5, 0.25])
    assert [module["inverse_sqrt"](step, 0) for step in (0, 3)] == [1.0, 0.5]
