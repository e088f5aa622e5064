"""Searches against brute force, over losses that are known, and over a real model."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.search.actions import (
    Action,
    Projections,
    Space,
    State,
    as_plan,
    make_full_space,
    make_space,
)
from sa_models.search.algorithms import (
    EvolutionOptions,
    GreedyOptions,
    Ranked,
    SearchResult,
    evolution_passes,
    evolve,
    greedy,
    greedy_passes,
)
from sa_models.search.measured_loss import MeasuredLoss, state_key
from sa_models.search.ranking import Agreement, EstimatedRanking, Estimator, agreement, spearman
from tests.support.reference import VOCABULARY, dense

LAYOUT = HeadLayout(layers=4, hidden_size=8, heads=2, kv_heads=2, head_dim=4)
UNITS = [(layer, unit) for layer in range(1, 4) for unit in range(2)]


KINDS = [("tie",), ("remove",), ("tie", "remove"), ("drop",)]


def space(
    kinds: tuple[str, ...] = ("tie", "remove"), needed: int = 3, saves: tuple[int, int] = (1, 1)
) -> Space:
    """A dropped layer saves a norm beside its two units."""
    return make_space(LAYOUT, kinds, "qkv", UNITS, UNITS, (), saves, needed, (1, 2, 3), 3)


class Table:
    """A loss that is a sum over actions, with a term for every pair."""

    def __init__(self, among: Space, seed: int = 0, pairs: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.actions = list(among.actions())
        self.one = torch.rand(len(self.actions), generator=generator, dtype=torch.float64)
        self.two = pairs * torch.rand(len(self.one), len(self.one), generator=generator)
        self.asked: list[State] = []
        self.slopes: dict[Action, float] = {}

    def __call__(self, state: State) -> float:
        self.asked.append(state)
        at = sorted(map(self.actions.index, state))
        pairs = sum(float(self.two[i, j]) for i, j in itertools.combinations(at, 2))
        noise = sum(self.slopes.get(action, 0.0) for action in state)
        return 2.0 + sum(float(self.one[i]) for i in at) + pairs + noise

    def rebase(self, state: State) -> None:
        pass

    def hold(self, state: State) -> None:
        pass

    def ranking(self, among: Space):
        def rank(state: State, count: int) -> list[Ranked]:
            rises = [
                Ranked(a, float(self.one[i]), self.slopes.get(a, 0.0))
                for i, a in enumerate(self.actions)
            ]
            allowed = [item for item in rises if among.allows(state, item.action)]
            return sorted(allowed, key=lambda item: item.rise)[:count]

        return rank


def valid_states(among: Space, size: int) -> list[State]:
    """Every set of so many actions that is a plan, written out from the definition."""
    found = []
    for actions in itertools.combinations(among.actions(), size):
        targets = []
        for a in actions:
            layer, unit = a.target
            targets += [(layer, 0), (layer, 1)] if a.kind == "drop" else [(layer, unit)]
        sources = [a.source for a in actions if a.source]
        gone = [a.target[0] for a in actions if a.kind == "remove"]
        apart = len(set(targets)) == len(targets) and not set(targets) & set(sources)
        if apart and all(gone.count(layer) < LAYOUT.units for layer in gone):
            found.append(frozenset(actions))
    return found


@pytest.mark.parametrize("kinds", KINDS)
def test_what_is_allowed_is_every_valid_state(kinds: tuple[str, ...]) -> None:
    among = space(kinds, needed=1)
    reached: set[State] = {frozenset()}
    for size in (1, 2, 3):
        reached = {s | {a} for s in reached for a in among.actions() if among.allows(s, a)}
        assert reached == set(valid_states(among, size))
        for state in reached:
            plan = as_plan(state, LAYOUT)
            assert plan.dropped(LAYOUT) == {a.target[0] for a in state if a.kind == "drop"}


@pytest.mark.parametrize("kinds", KINDS)
def test_no_choice_leads_into_a_dead_end(kinds: tuple[str, ...]) -> None:
    """With the largest budget, every allowed step must leave a way to meet it."""
    most = space(kinds, needed=1).most()
    assert most == (
        9 if "drop" in kinds else {1: {"tie": 6, "remove": 3}[kinds[0]], 2: 6}[len(kinds)]
    )
    among = space(kinds, needed=most)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        state: State = frozenset()
        while not among.is_met(state):
            allowed = [a for a in among.actions() if among.allows(state, a)]
            state |= {allowed[int(torch.randint(len(allowed), (), generator=generator))]}


def test_layers_are_not_dropped_beside_single_units() -> None:
    with pytest.raises(ValueError, match="drops layers or changes single units, not both"):
        space(("remove", "drop"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kinds", [("tie",), ("remove",), ("tie", "remove")])
def test_greedy_takes_the_best_at_every_step(seed: int, kinds: tuple[str, ...]) -> None:
    among = space(kinds)
    table = Table(among, seed)
    found = greedy(among, table, table.ranking(among), GreedyOptions(shortlist=1000))
    state: State = frozenset()
    for step in found.path:
        options = [state | {a} for a in among.actions() if among.allows(state, a)]
        (taken,) = step.actions
        state |= {taken}
        # SOURCES_PER_TARGET limits a shortlist: the best of the single step must still be in it
        assert step.loss == table(state)
        best = min(options, key=table)
        assert step.loss <= table(best) + 0.35
    first = min(valid_states(among, 1), key=table)
    assert frozenset(found.path[0].actions) == first
    assert found.loss == table(found.state) == found.path[-1].loss
    assert found.base_loss == 2.0
    assert [step.saved for step in found.path] == [1, 2, 3]


def test_a_short_list_is_measured_and_estimates_are_made_anew() -> None:
    among = space(("tie",), needed=4)
    table = Table(among)
    asked: list[State] = []

    def rank(state: State, count: int) -> list[Ranked]:
        asked.append(state)
        return table.ranking(among)(state, count)

    options = GreedyOptions(shortlist=2, estimate_every=2)
    found = greedy(among, table, rank, options)
    assert [len(state) for state in asked] == [0, 2]
    bound = greedy_passes(4, options)
    assert found.measured <= bound.forward
    assert len(set(table.asked)) <= bound.forward


def test_a_search_is_given_up_once_it_is_hopeless() -> None:
    among = space(("tie",), needed=4)
    table = Table(among)
    whole = greedy(among, table, table.ranking(among))
    asked: list[tuple[int, float]] = []

    def is_hopeless(saved: int, loss: float) -> bool:
        asked.append((saved, loss))
        return saved == 2

    found = greedy(among, table, table.ranking(among), is_hopeless=is_hopeless)
    assert found.path == whole.path[:2]
    assert asked == [(0, 2.0), *((step.saved, step.loss) for step in found.path)]
    assert not among.is_met(found.state)


def test_many_units_are_taken_in_few_rounds() -> None:
    options = GreedyOptions(shortlist=4, rounds=2)
    among = space(("tie",), needed=5)
    table = Table(among)
    found = greedy(among, table, table.ranking(among), options)
    assert len(found.path) == 2
    assert [len(step.actions) for step in found.path] == [3, 2]
    assert found.path[0].loss == table(frozenset(found.path[0].actions))
    assert greedy_passes(307).forward == 683  # Llama-2-7B at 30 %
    assert greedy_passes(19).forward == 172
    assert evolution_passes(19).forward == 1 + 16 * 21 + 38


def test_what_a_round_takes_beyond_its_shortlist_survives_new_estimates() -> None:
    """The cheapest ties of a layer have the same units of the layer below as sources, which no two
    layers in a row can have: a round of several takes what it has not measured."""
    layers, units = 16, 4
    layout = HeadLayout(layers, units * 8, units, units, 8)
    targets = [(layer, unit) for layer in range(1, layers) for unit in range(units)]
    share = ("q", "k", "v")
    among = make_space(layout, ("tie",), share, targets, targets, (), (1, 1), 24)

    def cost(action: Action) -> float:
        (layer, unit), source = action.target, action.source
        assert source is not None
        other = 0.01 * (unit != source[1])
        return 1e-3 * unit + 1e-5 * layer + 1e-6 * (layer - source[0]) + other

    def loss(state: State) -> float:
        return 3.0 + sum(map(cost, state))

    loss.rebase = loss.hold = lambda state: None  # type: ignore[attr-defined]

    def ranking(state: State, count: int) -> list[Ranked]:
        found = [
            Ranked(action, cost(action), 0.0, 0.5)
            for layer, unit in targets
            for source in itertools.product(range(max(0, layer - 3), layer), range(units))
            if among.allows(state, action := Action((layer, unit), source, share))
        ]
        return sorted(found, key=lambda r: (r.rise, r.action.key))[:count]

    options = GreedyOptions(shortlist=2, rounds=4, estimate_every=1)
    found = greedy(among, loss, ranking, options)
    assert among.saved(found.state) == 24
    assert found.rises.keys() == found.state
    assert found.loss == pytest.approx(loss(found.state))


def test_ties_that_were_far_come_back_when_the_others_run_out() -> None:
    model = dense("mha")
    layout = HeadLayout.from_config(model.config)
    units = [(layer, unit) for layer in range(1, 6) for unit in range(layout.units)]
    shares = {("q", "k"): 2, ("v", "o"): 2}
    among = make_full_space(layout, shares, units, (), (), 2, 4, twice=True)
    ranking = EstimatedRanking(among, MeasuredLoss(model, batches()))
    asked: list[tuple[Projections, ...]] = []

    def estimate(state: State, count: int) -> dict[str, Any]:
        asked.append(ranking._shares)
        share = ("q", "k") if not state else ("v", "o")
        left = [Action(unit, (0, 0), share) for unit in units] if share in ranking._shares else []
        actions = [[action.to_list(), 0.1, 0.0, 0.2] for action in left[:count]]
        return {"actions": actions, "agreement": [1, 1, 1.0]}

    ranking._estimate = estimate  # type: ignore[method-assign]
    assert {r.action.projections for r in ranking(frozenset(), 3)} == {("q", "k")}
    state = frozenset({Action((5, 0), (0, 0), ("q", "k"))})
    assert {r.action.projections for r in ranking(state, 3)} == {("v", "o")}
    assert asked == [(("q", "k"), ("v", "o")), (("q", "k"),), (("q", "k"), ("v", "o"))]


def test_an_action_that_saves_more_may_cost_more() -> None:
    """In parameters a removal saves 4 and a tie 3: the rise is weighed by it."""
    among = space(needed=4, saves=(3, 4))

    def loss(state: State) -> float:
        return 1.0 + sum({"tie": 0.31, "remove": 0.4}[a.kind] for a in state)

    loss.rebase = loss.hold = lambda state: None  # type: ignore[attr-defined]

    def rank(state: State, count: int) -> list[Ranked]:
        return [Ranked(a, loss(state | {a}) - loss(state), 0.0) for a in among.actions()]

    found = greedy(among, loss, rank)  # type: ignore[arg-type]
    assert [a.kind for a in found.state] == ["remove"]


@pytest.mark.parametrize("search", [greedy, evolve])
def test_the_slopes_of_the_text_choose_nothing(search: Callable[..., SearchResult]) -> None:
    """They change every measured loss, and none of the choices."""
    among = space()
    table = Table(among)
    plain = search(among, table, table.ranking(among))
    generator = torch.Generator().manual_seed(5)
    table.slopes = {a: float(torch.randn((), generator=generator)) for a in table.actions}
    found = search(among, table, table.ranking(among))
    assert found.state == plain.state
    assert found.rises == pytest.approx(plain.rises)
    noise = sum(table.slopes[a] for a in found.state)
    assert found.loss == pytest.approx(plain.loss + noise)
    assert [step.loss for step in found.path] != [step.loss for step in plain.path]


@pytest.mark.parametrize("search", [greedy, evolve])
def test_ties_that_cost_more_than_a_removal_are_told(search: Callable[..., SearchResult]) -> None:
    """Units of odd layers are cheap to remove, those of layer 2 dear; of one nobody knows."""
    among = space(("tie",), needed=6)
    table = Table(among, pairs=0.0)
    unknown = (3, 1)

    def rank(state: State, count: int) -> list[Ranked]:
        found = table.ranking(among)(state, count)
        gone = {u: math.nan if u == unknown else -1.0 if u[0] % 2 else 9.0 for u in UNITS}
        # A unit that is tied already has another removal, which says nothing of the first.
        tied = {a.target for a in state}
        return [r._replace(removal=99.0 if r.action.target in tied else gone[r.action.target])
                for r in found]  # fmt: skip

    found = search(among, table, rank)
    costs = {a.target: float(table.one[table.actions.index(a)]) for a in found.state}
    assert set(costs) == set(UNITS)
    cheap = [(1, 0), (1, 1), (3, 0)]
    told = found.dearer_than_removal(UNITS)
    assert told == pytest.approx({unit: costs[unit] for unit in cheap})
    assert [found.removals[unit] for unit in cheap] == [-1.0] * 3
    assert set(found.dearer_than_removal([(1, 1), (2, 0)])) == {(1, 1)}


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_what_brute_force_finds(seed: int) -> None:
    among = space()
    table = Table(among, seed)
    options = EvolutionOptions(population=20, generations=20, seed=seed, pool=20)
    found = evolve(among, table, table.ranking(among), options)
    best = min(valid_states(among, 3), key=table)
    assert found.loss == pytest.approx(table(best), abs=1e-12)
    assert among.is_met(found.state)
    assert found.path[-1].loss == found.loss
    assert found == evolve(among, table, table.ranking(among), options)
    other = EvolutionOptions(population=20, generations=1, seed=seed + 1, pool=20)
    assert evolve(among, table, table.ranking(among), other).loss >= found.loss


@pytest.mark.parametrize("search", [greedy, evolve])
@pytest.mark.parametrize("seed", range(4))
def test_a_layer_may_lose_all_its_units(search: Callable[..., SearchResult], seed: int) -> None:
    """A unit saves one, the last of a layer two: four units of which two share a layer, or five."""
    among = make_space(
        LAYOUT, ["remove"], (), (), UNITS, (), (0, 1), 5, drop_saves=3, emptiable=(1, 2, 3)
    )
    table = Table(among, seed)
    found = search(among, table, table.ranking(among))
    plan = as_plan(found.state, LAYOUT)
    assert among.saved(found.state) == len(plan.removed) + len(plan.dropped(LAYOUT)) >= 5
    every = map(
        frozenset, itertools.chain(*(itertools.combinations(among.actions(), n) for n in (4, 5, 6)))
    )
    every = [state for state in every if among.saved(state) >= 5]
    best = min(map(table, every))
    assert found.loss == pytest.approx(best) if search is evolve else found.loss < best + 0.5


# --- as many units of every layer -----------------------------------------------------------------

WIDE = HeadLayout(layers=3, hidden_size=16, heads=8, kv_heads=4, head_dim=4)


def uniform_space(each: int, saves: int = 1) -> Space:
    """Of 3 layers of 4 units, layer 0 included."""
    units = [(layer, unit) for layer in range(3) for unit in range(4)]
    needed = 3 * each * saves
    return make_space(WIDE, ["remove"], "qkv", (), units, (), (0, saves), needed, uniform=each)


def uniform_states(each: int) -> list[State]:
    """Every choice of so many units in each layer."""
    of_units = list(itertools.combinations(range(4), each))
    of_layer = [
        [frozenset(Action((layer, u)) for u in units) for units in of_units] for layer in range(3)
    ]
    return [frozenset().union(*parts) for parts in itertools.product(*of_layer)]


@pytest.mark.parametrize("each", [1, 2, 3])
def test_what_is_allowed_of_every_layer_is_as_many_units(each: int) -> None:
    among = uniform_space(each)
    assert among.most() == among.needed == among.largest == 3 * each
    reached: set[State] = {frozenset()}
    for _ in range(3 * each):
        reached = {s | {a} for s in reached for a in among.actions() if among.allows(s, a)}
    assert reached == set(uniform_states(each))
    in_turn: set[State] = {frozenset()}
    for size in range(1, 3 * each + 1):
        in_turn = {
            s | {a}
            for s in in_turn
            for a in among.actions()
            if among.in_turn(s, a) and among.allows(s, a)
        }
        for state in in_turn:
            counts = [sum(a.target[0] == layer for a in state) for layer in range(3)]
            assert sorted(counts) == sorted((size + n) // 3 for n in range(3))
    assert in_turn == reached


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_uniform_search_finds_what_brute_force_finds(seed: int, each: int) -> None:
    """Without pairs the best of each layer are the best of all; with pairs only evolution looks
    back. Three units a round, which cross the border of a turn, change nothing."""
    among = uniform_space(each, saves=5)
    alone, pairs = Table(among, seed, pairs=0.0), Table(among, seed)
    best = min(uniform_states(each), key=alone)
    for rounds in (32, 3 * each - 1):
        options = GreedyOptions(shortlist=3, rounds=rounds)
        found = greedy(among, alone, alone.ranking(among), options)
        assert found.state == best
        assert found.loss == pytest.approx(alone(best), abs=1e-12)
        turns = [a.target[0] for step in found.path for a in step.actions]
        if rounds == 32:
            assert [sorted(turns[i : i + 3]) for i in range(0, 3 * each, 3)] == [[0, 1, 2]] * each
    found = greedy(among, pairs, pairs.ranking(among), GreedyOptions(shortlist=100))
    state: State = frozenset()
    for step in found.path:  # the best of those whose turn it is
        turn = [a for a in among.actions() if among.in_turn(state, a) and among.allows(state, a)]
        state |= {min(turn, key=lambda a: pairs(state | {a}))}
        assert state == state | set(step.actions)
    options = EvolutionOptions(population=20, generations=20, seed=seed, pool=20)
    evolved = evolve(among, pairs, pairs.ranking(among), options)
    assert evolved.state in uniform_states(each)
    assert evolved.loss == pytest.approx(min(map(pairs, uniform_states(each))), abs=1e-12)


def test_halves_agree_layer_by_layer() -> None:
    """Layer 0 is the cheapest by far: over all layers both halves would choose it alone."""
    among = uniform_space(1)
    rises = [{(layer, u): 10.0 * layer + u for layer in range(3) for u in range(4)} for _ in "ab"]
    rises[1][(2, 3)] = 19.0  # the other half's choice in layer 2
    halves = [[Ranked(Action(u), r, 0.0) for u, r in half.items()] for half in rises]
    units, common, _ = agreement(among, *halves)
    assert (units, common) == (3, 2)


# --- with a model ---------------------------------------------------------------------------------


def batches(seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCABULARY, (4, 9), generator=generator)}]


def searched(
    path: Path | None, kinds: tuple[str, ...] = ("tie", "remove"), seed: int = 1
) -> tuple[SearchResult, MeasuredLoss, EstimatedRanking]:
    model = dense("gqa")
    layout = HeadLayout.from_config(model.config)
    units = [(layer, unit) for layer in range(1, 6) for unit in range(layout.units)]
    among = make_space(layout, kinds, "qkvo", units, units, (), (1, 1), 5)
    measured = MeasuredLoss(model, batches(seed), path)
    ranking = EstimatedRanking(among, measured)
    options = GreedyOptions(shortlist=4, estimate_every=2)
    return greedy(among, measured, ranking, options), measured, ranking


@pytest.mark.parametrize("kinds", [("tie",), ("remove",), ("tie", "remove")])
def test_the_losses_of_a_path_are_the_real_ones(kinds: tuple[str, ...]) -> None:
    found, measured, ranking = searched(None, kinds)
    state: State = frozenset()
    fresh = MeasuredLoss(dense("gqa"), batches())
    for step in found.path:
        state |= set(step.actions)
        assert step.loss == pytest.approx(fresh(state), abs=1e-6)
    assert state == found.state
    assert ranking.agreement is not None
    assert 0 <= ranking.agreement.common <= ranking.agreement.units == 5
    as_plan(found.state, HeadLayout.from_config(dense("gqa").config))
    # A search that goes on from where it was computes less than as many full passes.
    assert measured.passes < found.measured


def test_a_second_search_measures_nothing(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    first, measured, ranking = searched(file)
    assert measured.passes > 0
    assert ranking.estimates == 2  # of five rounds, before the first and the third
    text = file.read_text()
    again, idle, still = searched(file)
    assert again == first
    assert (idle.passes, still.estimates) == (0, 0)
    assert file.read_text() == text
    assert still.agreement == ranking.agreement
    # Killed in the middle, in the middle of a line.
    lines = text.splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    resumed, some, _ = searched(file)
    assert resumed == first
    assert 0 < some.passes < measured.passes
    assert sorted(file.read_text().splitlines()) == sorted(text.splitlines())
    # Another text is another search; what is known of this one stays.
    other, anew, _ = searched(file, seed=2)
    assert anew.passes > 0
    assert other.base_loss != first.base_loss
    assert searched(file)[1].passes == 0


def test_a_cache_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    file.write_text('{"key": 1}\n')
    with pytest.raises(PostshareError, match=r"line 1 is no measurement; delete the file"):
        searched(file)


def test_a_search_that_may_empty_layers_has_rankings_of_its_own(tmp_path: Path) -> None:
    model = dense("gqa")
    layout = HeadLayout.from_config(model.config)
    units = [(layer, unit) for layer in range(1, 6) for unit in range(layout.units)]
    state = frozenset(Action((2, unit)) for unit in range(layout.units - 1))
    last = (2, layout.units - 1)
    for emptiable in ((), (1, 2)):
        among = make_space(
            layout, ("remove",), "qkvo", (), units, (), (0, 1), 5,
            drop_saves=layout.units, emptiable=emptiable,
        )  # fmt: skip
        measured = MeasuredLoss(model, batches(), tmp_path / "cache.jsonl")
        measured.rebase(state)
        ranked = EstimatedRanking(among, measured)(state, len(units))
        measured.restore()
        assert (last in {r.action.target for r in ranked}) == bool(emptiable)


def test_a_loss_that_is_not_finite_is_one_line_and_not_kept(tmp_path: Path) -> None:
    model = dense("gqa")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[0, 0] = math.nan
    measured = MeasuredLoss(model, batches(), tmp_path / "cache.jsonl")
    with pytest.raises(PostshareError, match=r"^the calibration loss of the model is nan; check"):
        measured(frozenset())
    two = frozenset({Action((3, 1)), Action((4, 0))})
    with pytest.raises(PostshareError, match=r"loss with 'remove \[3, 1\]' and 1 more is nan;"):
        measured(two)
    assert not (tmp_path / "cache.jsonl").exists()


def test_every_estimate_has_a_bar_over_both_halves() -> None:
    told: list[list[tuple[int, int]]] = []

    @contextmanager
    def bar() -> Iterator[Progress]:
        told.append([])
        yield lambda done, total: told[-1].append((done, total))

    odd = [{"input_ids": batch["input_ids"][:3]} for batch in batches()]
    estimator = Estimator(MeasuredLoss(dense("gqa"), odd), bar=bar)
    estimator.at(frozenset(), ())
    estimator.at(frozenset(), ())  # known
    estimator.at(frozenset({Action((2, 0))}), ())
    assert told == [[(1, 3), (2, 3), (3, 3)]] * 2


def test_names_of_states_are_canonical() -> None:
    a, b = Action((3, 1), (0, 1), ("q", "k")), Action((2, 0))
    assert state_key([a, b]) == state_key([b, a]) != state_key([a])
    listed = json.loads(state_key([a, b]).removeprefix("loss "))
    assert [Action.from_list(value) for value in listed] == [b, a]


def test_halves_tell_whether_the_text_is_enough() -> None:
    assert Agreement(20, 15, 0.5).is_stable is False
    assert Agreement(20, 16, 0.9).is_stable is True
    # Twice as many units differ as may: four times the text.
    assert Agreement(20, 12, 0.5).blocks_needed(8) == 32
    one = [{"input_ids": batches()[0]["input_ids"][:1]}]
    measured = MeasuredLoss(dense("gqa"), one)
    with pytest.raises(PostshareError, match="a single block"):
        EstimatedRanking(space(), measured)
    values = torch.tensor([3.0, 1.0, 2.0, 9.0])
    assert spearman(values, values.exp()) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert not math.isnan(spearman(values[:1], values[:1]))
