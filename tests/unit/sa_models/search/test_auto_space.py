"""The space of strategy auto: what is valid and what is saved, against brute force and the plan."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sa_models import SharedLlamaForCausalLM, SharingPlan
from sa_models.export.export import export_model
from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.plan import HeadTie
from sa_models.search.actions import Action, Space, State, as_plan, make_full_space
from sa_models.search.budget import tie_saves
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.search.spans import SpanChoice, best_spans, candidate_spans
from sa_models.search.structures import MAX_FOLLOWERS, any_spans, rise_at, structures
from sa_models.weights.compact_folder import open_weights
from tests.support.reference import Reference, dense, tokens

QKVO, QKV, QK, VO = (tuple(share) for share in ("qkvo", "qkv", "qk", "vo"))
SHAPES = {
    "mha": HeadLayout(layers=3, hidden_size=8, heads=2, kv_heads=2, head_dim=4),
    "gqa": HeadLayout(layers=3, hidden_size=8, heads=4, kv_heads=2, head_dim=2),
}


def space(
    layout: HeadLayout,
    needed: int = 1,
    counted: str = "parameters",
    shares: tuple[tuple[str, ...], ...] = (QKVO, QKV, QK, VO),
    emptiable: tuple[int, ...] = (),
) -> Space:
    removal = 1 if counted == "units" else tie_saves("parameters", layout, QKVO)
    norm = 0 if counted == "units" else layout.hidden_size
    units = [(layer, unit) for layer in range(1, 3) for unit in range(layout.units)]
    return make_full_space(
        layout,
        {share: tie_saves(counted, layout, share) for share in shares},  # type: ignore[arg-type]
        units,
        units,
        (),
        removal,
        needed,
        twice=counted != "units",
        emptiable=emptiable,
        drop_saves=layout.units * removal + norm,
    )


def valid_states(among: Space) -> set[State]:
    """Every set of actions that is a plan in which no changed unit is a source, by definition."""
    options: list[list[tuple[Action, ...]]] = []
    for unit in among.targets:
        sources = [s for s in sorted(among.sources) if s[0] < unit[0]]
        one = [Action(unit, s, share) for s in sources for share in among.shares]
        two = [
            pair
            for pair in itertools.combinations(one, 2)
            if not set(pair[0].projections) & set(pair[1].projections)
        ]
        options.append([(), (Action(unit),), *((a,) for a in one), *(two if among.twice else [])])
    found = set()
    for parts in itertools.product(*options):
        state = frozenset(action for part in parts for action in part)
        targets, sources = {a.target for a in state}, {a.source for a in state if a.source}
        gone = [a.target[0] for a in state if a.source is None]
        kept = {layer for layer in gone if gone.count(layer) < among.layout.units}
        if not targets & sources and kept | among.emptiable >= {*gone}:
            found.add(state)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counted", ["parameters", "units"])
@pytest.mark.parametrize("emptiable", [(), (1,)])
def test_most_and_allowed_are_those_of_brute_force(
    shape: str, counted: str, emptiable: tuple[int, ...]
) -> None:
    among = space(SHAPES[shape], 1, counted, (QKV, QK, VO), emptiable)
    every = valid_states(among)
    best = max(among.saved(state) for state in every)
    assert among.most() == best
    assert among.largest == -(-1 // min(*among.shares.values(), among.removal_saves))
    tight = space(SHAPES[shape], best, counted, (QKV, QK, VO), emptiable)
    reachable: dict[State, int] = {}
    for state in every:
        for size in range(len(state) + 1):
            if size > 2:
                break
            for part in itertools.combinations(state, size):
                key = frozenset(part)
                reachable[key] = max(reachable.get(key, 0), among.saved(state))
    small = [state for state in every if len(state) <= 1]
    for state in small:
        assert among.most(state) == reachable[state]
        for action in among.actions():
            with_it = state | {action}
            valid = action not in state and with_it in every
            assert among.allows(state, action) == valid
            assert tight.allows(state, action) == (valid and reachable[with_it] >= best)


@pytest.mark.parametrize("emptiable", [(), (2, 3, 5)])
@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa", "odd"])
def test_what_is_saved_is_what_the_plan_says(shape: str, emptiable: tuple[int, ...]) -> None:
    config = dense(shape).config
    layout = HeadLayout.from_config(config)
    units = [(layer, unit) for layer in range(1, 6) for unit in range(layout.units)]
    among = make_full_space(
        layout,
        {share: tie_saves("bytes", layout, share) for share in (QKVO, QKV, QK, VO)},
        units,
        units,
        (),
        tie_saves("bytes", layout, QKVO),
        1,
        twice=True,
        emptiable=emptiable,
        drop_saves=layout.units * tie_saves("bytes", layout, QKVO) + layout.hidden_size,
    )
    generator = torch.Generator().manual_seed(0)
    dropped: set[int] = set()
    for draw in range(10):
        state: State = frozenset()
        allowed = [a for a in among.actions() if draw % 2 or a.source is None]
        for at in torch.randperm(len(allowed), generator=generator).tolist()[:40]:
            if among.allows(state, allowed[at]):
                state |= {allowed[at]}
        plan = as_plan(state, layout)
        plan.validate(config)
        assert among.saved(state) == plan.savings(config).removed_parameters
        dropped |= plan.dropped(layout)
        per_unit = {t.target for t in plan.ties} | set(plan.removed)
        assert len(per_unit) <= layout.units * 5
    assert dropped == {*emptiable}


def test_two_ties_to_one_source_are_one() -> None:
    state = {Action((2, 0), (1, 1), VO), Action((2, 0), (1, 1), QK), Action((2, 1), (0, 0), QK)}
    assert as_plan(state, SHAPES["mha"]).ties == (
        HeadTie((2, 0), (1, 1), QKVO),
        HeadTie((2, 1), (0, 0), QK),
    )


@pytest.mark.parametrize("shape", ["mha", "gqa", "odd"])
def test_two_sources_of_one_unit_through_materializing_and_export(
    shape: str, tmp_path: Path
) -> None:
    """Measured, materialized, compact, exported and loaded: the model written out by head."""
    twice = frozenset(
        {Action((3, 1), (0, 2), QK), Action((3, 1), (2, 0), VO), Action((4, 0)),
         Action((5, 2), (2, 0), QKV)}
    )  # fmt: skip
    model = dense(shape)
    plan = as_plan(twice, HeadLayout.from_config(model.config))
    plan.validate(model.config)
    ids = tokens()
    expected = Reference.of(model, plan)(ids).logits
    measured = MeasuredLoss(model, [{"input_ids": ids}])
    loss = measured(twice)
    picked = expected[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert loss == pytest.approx(-float(picked.mean()), abs=2e-6)
    measured.restore()
    model.save_pretrained(tmp_path / "base")
    materialize_(dict(model.named_parameters()), HeadLayout.from_config(model.config), plan)
    compact = SharedLlamaForCausalLM.from_materialized(model, plan).eval()
    with torch.no_grad():
        assert float((compact(ids).logits - expected).abs().max()) <= 1e-5
        assert float((model(ids).logits - expected).abs().max()) <= 1e-5
    export_model(
        open_weights(tmp_path / "base"),
        plan,
        tmp_path / "export",
        dtype=torch.float32,
        shard_bytes=10**9,
    )
    for kind in ("compact", "dense"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "export" / kind, dtype=torch.float32
        )
        with torch.no_grad():
            assert float((loaded(ids).logits - expected).abs().max()) <= 1e-5


# --- structures -----------------------------------------------------------------------------------


def test_structures_are_the_best_spans_of_doubling_numbers_and_the_divisors() -> None:
    config = dense("gqa").config  # 6 layers, 4 KV heads
    cheap = dict.fromkeys(candidate_spans(6, MAX_FOLLOWERS, (0,)), -1.0)
    asked: list[tuple[str, int]] = []
    for span in cheap:
        if span.leader == 3:
            cheap[span] = -0.1 * len(span.followers)

    def met(plan: SharingPlan) -> bool:
        return sum(len(span.followers) for span in plan.spans) >= 3

    def spans_of(share: str, followers: int) -> list[SpanChoice]:
        asked.append((share, followers))
        if share == "kv":
            return any_spans(6, (0,), share, followers)
        return best_spans(cheap, 6, followers, MAX_FOLLOWERS, (0,))

    found = structures(config, (0,), spans_of, met)
    assert asked == [(share, n) for share in ("attention", "kv") for n in (1, 2, 3)]
    spans = [[(s.leader, s.followers, s.share) for s in plan.spans] for plan in found if plan.spans]
    assert spans[0] == [(3, (4,), "attention")]
    assert spans[1] == [(3, (4, 5), "attention")]
    assert [sum(len(s[1]) for s in plan) for plan in spans] == [1, 2, 3, 1, 2, 3]
    assert {s[0] for plan in spans for s in plan} >= {3}
    assert all(0 not in (s[0], *s[1]) for plan in spans for s in plan)
    assert [plan.kv_heads for plan in found[6:]] == [1, 2]
    assert [plan.kv_heads for plan in structures(config, (0,), None, met)] == [1, 2]

    def of_keys(share: str, followers: int) -> list[SpanChoice] | None:
        return spans_of(share, followers) if share == "kv" and followers < 3 else None

    left = structures(config, (0,), of_keys, met)
    assert left == [plan for plan in found if plan in left]
    assert [sum(len(s.followers) for s in plan.spans) for plan in left] == [1, 2, 0, 0]


def test_what_the_rest_costs_is_read_off_the_path() -> None:
    path = [(0, 0.0), (10, 0.5), (30, 2.5)]
    assert [rise_at(path, x) for x in (-3, 0, 5, 10, 20, 40)] == [0, 0, 0.25, 0.5, 1.5, 3.5]
    assert rise_at(path[:1], 7) == 0.0
