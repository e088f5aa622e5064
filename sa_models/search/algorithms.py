"""Algorithms for the state that costs least loss and saves enough: greedy, and evolutionary.

Both see a loss (state -> nats per token) and a ranking (the actions that seem cheapest from a
state, with what they seem to cost), and nothing else. Both are deterministic, and so go on from
the cache of the losses as if they had never stopped.

**Slopes.** On a little text a loss has a slope in every direction, of which a trained model has
none over all text: it is what these few tokens happen to say. A search that follows it chooses what
fits them. So the slope of every action, known from the estimate, is taken off what is measured;
what is left is the curvature, which lasts (docs/planning.md has the numbers).

*Greedy.* In every round the cheapest-looking actions are measured, and the best of them are taken;
where all layers are to lose as many units, of the layers whose turn it is. What has been measured
in an earlier round replaces the estimate; estimates are made anew every few
rounds. *Evolutionary* (as in 2409.17372): states that meet the budget, of which the better halves
are crossed and mutated for some generations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.search.actions import Action, Space, State, ordered
from sa_models.ties import Unit

SOURCES_PER_TARGET = 2
"""Ties of one target in a shortlist: its sources cost nearly the same, other targets do not."""
NOTHING_LEFT = "no state meets the budget; lower plan.budget, or skip fewer layers"


class StateLoss(Protocol):
    """Loss of a state, nats per token."""

    def __call__(self, state: State) -> float: ...

    def rebase(self, state: State) -> None:
        """A hint: the states asked for from now on contain this one."""

    def hold(self, state: State) -> None:
        """A hint: of the states asked for, this one is the best so far."""


class Ranked(NamedTuple):
    """An action as an estimate sees it.

    ``rise`` is what the loss is expected to rise on text of this kind, ``slope`` what the
    calibration text adds to that in a measurement, nats per token; ``removal`` what it is expected
    to rise when the same unit is removed, nan where nobody knows.
    """

    action: Action
    rise: float
    slope: float
    removal: float = math.nan


Ranking = Callable[[State, int], list[Ranked]]
"""Called with a state and a number: so many allowed actions, cheapest first."""


@dataclass(frozen=True)
class Step:
    """One step of a path: actions that were taken together, and the measured loss after them."""

    actions: tuple[Action, ...]
    loss: float
    saved: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        state: meets the budget, unless the search was given up.
        loss, base_loss: measured, with this state and with none.
        path: from nothing to the state; every loss is measured.
        rises: the rise of the loss, without the slope, that an action of the state had where it
            was last measured, or estimated where it never was.
        measured: states that were asked for.
        removals: what the removal of each tied unit was expected to cost, when it was last ranked
            unchanged; nan where nobody knows.
    """

    state: State
    loss: float
    base_loss: float
    path: tuple[Step, ...]
    rises: dict[Action, float]
    measured: int
    removals: dict[Unit, float] = field(default_factory=dict)

    def dearer_than_removal(self, removable: Iterable[Unit]) -> dict[Unit, float]:
        """The tied units whose removal would cost less, and what their ties cost, nats per token.

        Args:
            removable: the units that could be removed; others are never told.
        """
        costs: dict[Unit, float] = {}
        for action in ordered(self.state):
            if action.source is not None:
                costs[action.target] = costs.get(action.target, 0.0) + self.rises[action]
        could = {unit: self.removals.get(unit, math.nan) for unit in removable}
        # A comparison with nan is false: what nobody knows is not told.
        return {unit: cost for unit, cost in costs.items() if cost > could.get(unit, math.nan)}


@dataclass(frozen=True)
class GreedyOptions:
    """How thorough the greedy search is.

    Attributes:
        shortlist: actions that are measured in a round; twice what a round takes, if that is more.
        rounds: at most so many: with more units than rounds, a round takes several.
        estimate_every: rounds between new estimates; none where fewer than half as many are left.
    """

    shortlist: int = 8
    rounds: int = 32
    estimate_every: int = 6

    def per_round(self, actions: int) -> int:
        return math.ceil(actions / self.rounds)

    def measured(self, per_round: int) -> int:
        return max(self.shortlist, 2 * per_round)


@dataclass(frozen=True)
class EvolutionOptions:
    """The evolutionary search.

    Attributes:
        population: states of a generation.
        generations: after the first.
        mutations: actions that are exchanged in a child, at most.
        pool: cheapest-looking actions that mutations draw from, times those of a state.
    """

    population: int = 16
    generations: int = 20
    mutations: int = 3
    pool: int = 3
    seed: int = 0


def price(space: Space, action: Action, rise: float) -> float:
    """What an action costs for what it saves; a lower loss counts the more, the more it saves."""
    saved = space.saves(action)
    return rise / saved if rise > 0 else rise * saved


def greedy(
    space: Space,
    loss: StateLoss,
    ranking: Ranking,
    options: GreedyOptions | None = None,
    progress: Progress | None = None,
    is_hopeless: Callable[[int, float], bool] | None = None,
) -> SearchResult:
    """Take the best of the shortlist, again and again, until the budget is met.

    Args:
        progress: called with (saved, needed) in the space's units after every round.
        is_hopeless: called with (saved, loss) before every round: whether to give the search up.
    """
    options = options or GreedyOptions()
    state: State = frozenset()
    path: list[Step] = []
    base = current = loss(state)
    asked, last_rank = 1, -options.estimate_every
    complete = False
    known: dict[Action, float] = {}
    slopes: dict[Action, float] = {}
    rises: dict[Action, float] = {}
    removals: dict[Unit, float] = {}
    per_round = options.per_round(space.largest)
    count = options.measured(per_round)
    while not space.is_met(state):
        if is_hopeless is not None and is_hopeless(space.saved(state), current):
            break
        loss.rebase(state)
        candidates = _cheapest(space, state, known, count)
        short = len(candidates) < count and not complete
        left = math.ceil((space.needed - space.saved(state)) / space.least / per_round)
        old = len(path) >= last_rank + options.estimate_every
        if (old and left > options.estimate_every / 2) or not path or short:
            # Where layers take turns, all are ranked: each has to have its next unit.
            wanted = len(space.removable) if space.uniform else count * (1 + options.estimate_every)
            ranked = ranking(state, wanted)
            complete = len(ranked) < wanted or bool(space.uniform)
            # What a round took beyond its shortlist is in the state and was never measured.
            known = {r.action: r.rise for r in ranked} | {a: known[a] for a in (*rises, *state)}
            slopes = {r.action: r.slope for r in ranked} | slopes
            removals |= _removals(state, ranked)
            last_rank = len(path)
            candidates = _cheapest(space, state, known, count)
        if not candidates:
            raise PostshareError(NOTHING_LEFT)
        fresh: set[Action] = set()
        # What a round takes has been measured in it; what was measured earlier is believed until
        # it comes to the top.
        due = [action for action in candidates if action not in rises]
        due = due or candidates[:per_round]
        while due and len(fresh) < count:
            for action in due[: count - len(fresh)]:
                rises[action] = loss(state | {action}) - current - slopes[action]
                known[action] = rises[action]
                fresh.add(action)
                if action == min(fresh, key=lambda a: (price(space, a, known[a]), a.key)):
                    loss.hold(state | {action})
            due = [a for a in _cheapest(space, state, known, per_round) if a not in fresh]
        asked += len(fresh) + 1
        taken: list[Action] = []
        # Of several at a time one may rule out another: then what was measured earlier follows,
        # and what was not measured.
        by_price = sorted(known, key=lambda a: (price(space, a, known[a]), a.key))
        first = [a for a in by_price if a in (fresh if due else rises)]
        rest = [] if per_round == 1 else [a for a in by_price if a not in first]
        for action in first + rest:
            so_far = state | set(taken)
            if len(taken) == per_round or space.is_met(so_far):
                break
            if space.in_turn(so_far, action) and space.allows(so_far, action):
                taken.append(action)
        state = state | set(taken)
        current = loss(state)
        path.append(Step(tuple(taken), current, space.saved(state)))
        if progress is not None:
            progress(min(space.saved(state), space.needed), space.needed)
    kept = {action: known[action] for action in state}
    instead = _of_tied(state, removals)
    return SearchResult(state, current, base, tuple(path), kept, asked, instead)


def _removals(state: State, ranked: Iterable[Ranked]) -> dict[Unit, float]:
    """What removals are expected to cost, of units that the state does not change."""
    changed = {action.target for action in state}
    return {r.action.target: r.removal for r in ranked if r.action.target not in changed}


def _of_tied(state: State, removals: dict[Unit, float]) -> dict[Unit, float]:
    return {a.target: removals.get(a.target, math.nan) for a in ordered(state) if a.source}


def _cheapest(space: Space, state: State, known: dict[Action, float], count: int) -> list[Action]:
    """The allowed actions that seem cheapest, a few for every target."""
    found: list[Action] = []
    ties: dict[object, int] = {}
    for action in sorted(known, key=lambda a: (price(space, a, known[a]), a.key)):
        if len(found) == count:
            break
        if action.kind == "tie" and ties.get(action.target, 0) == SOURCES_PER_TARGET:
            continue
        if space.in_turn(state, action) and space.allows(state, action):
            found.append(action)
            if action.kind == "tie":
                ties[action.target] = ties.get(action.target, 0) + 1
    return found


# --- evolutionary ---------------------------------------------------------------------------------


def evolve(
    space: Space,
    loss: StateLoss,
    ranking: Ranking,
    options: EvolutionOptions | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Cross and mutate states that meet the budget; the best one that was ever measured wins.

    Args:
        progress: called with (done, total) measured states.
    """
    options = options or EvolutionOptions()
    draw = random.Random(options.seed)
    empty: State = frozenset()
    base = loss(empty)
    pool = ranking(empty, options.pool * space.largest * SOURCES_PER_TARGET)
    rises = {r.action: r.rise for r in pool}
    slopes = {r.action: r.slope for r in pool}
    cheap = sorted(rises, key=lambda a: (price(space, a, rises[a]), a.key))
    total = options.population * (1 + options.generations)
    losses: dict[State, float] = {}
    """Without the slopes."""

    def measure(states: Iterable[State]) -> None:
        for state in states:
            losses[state] = loss(state) - sum(slopes.get(a, 0.0) for a in ordered(state))
            if progress is not None:
                progress(min(len(losses), total), total)

    population = [_complete(space, empty, cheap)]
    while len(population) < options.population:
        population.append(_mutated(space, population[0], cheap, len(population), draw))
    measure(population)
    for _ in range(options.generations):
        best = sorted(dict.fromkeys(population), key=lambda s: (losses[s], _name(s)))
        parents = best[: max(2, options.population // 2)]
        children = []
        for _ in range(options.population):
            mother, father = draw.choice(parents), draw.choice(parents)
            child = _crossed(space, mother, father, cheap, draw)
            children.append(_mutated(space, child, cheap, options.mutations, draw))
        measure(children)
        population = parents + children
    state = min(losses, key=lambda s: (losses[s], _name(s)))
    path = _path(space, loss, state, rises)
    if progress is not None:
        progress(total, total)
    kept = {a: rises.get(a, math.nan) for a in state}
    instead, asked = _of_tied(state, _removals(empty, pool)), 1 + len(losses) + len(path)
    return SearchResult(state, loss(state), base, path, kept, asked, instead)


def _name(state: State) -> list[tuple]:
    return [action.key for action in ordered(state)]


def _complete(space: Space, state: State, actions: Iterable[Action]) -> State:
    """The state with further actions, in their order, until it meets the budget."""
    for action in actions:
        if space.is_met(state):
            break
        if space.allows(state, action):
            state = state | {action}
    if not space.is_met(state):  # what was ranked does not reach: any other action
        for action in space.actions():
            if space.allows(state, action):
                state = state | {action}
            if space.is_met(state):
                break
    if not space.is_met(state):
        raise PostshareError(NOTHING_LEFT)
    return state


def _mutated(
    space: Space, state: State, cheap: list[Action], most: int, draw: random.Random
) -> State:
    """Some actions are given up, and others drawn, the cheaper the likelier."""
    count = min(draw.randint(1, most), len(state))
    kept = frozenset(draw.sample(ordered(state), len(state) - count))
    return _complete(space, kept, _drawn(cheap, draw))


def _crossed(
    space: Space, mother: State, father: State, cheap: list[Action], draw: random.Random
) -> State:
    """What both have, and of the rest what is drawn."""
    rest = ordered(mother ^ father)
    draw.shuffle(rest)
    return _complete(space, mother & father, [*rest, *_drawn(cheap, draw)])


def _drawn(cheap: list[Action], draw: random.Random) -> list[Action]:
    """A random order, in which cheap actions tend to come first."""
    places = {action: i * draw.random() for i, action in enumerate(cheap, start=1)}
    return sorted(cheap, key=lambda action: (places[action], action.key))


def _path(
    space: Space, loss: StateLoss, state: State, rises: dict[Action, float]
) -> tuple[Step, ...]:
    """From nothing to the state, cheapest-looking action first."""
    taken: State = frozenset()
    steps = []
    for action in sorted(state, key=lambda a: (rises.get(a, math.inf), a.key)):
        loss.rebase(taken)
        taken = taken | {action}
        steps.append(Step((action,), loss(taken), space.saved(taken)))
    return tuple(steps)


# --- what it takes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Passes over the calibration text, at most.

    Attributes:
        forward: whole forward passes that measure; those of upper layers count as whole ones.
        backward: forward and backward passes that estimate.
    """

    forward: int
    backward: int


def greedy_passes(actions: int, options: GreedyOptions | None = None) -> Passes:
    """A bound for a greedy search that takes ``actions`` actions.

    ``rounds * (shortlist + 1) + 1`` forward passes where a round takes one action, and
    ``rounds * (shortlist + 2) + 1`` where it takes several, whatever the model: a Llama-2-7B at
    30 % (307 of 1,024 heads) takes 31 rounds of 10 heads, 683 passes at most. About half of the
    layers are computed in the mean.
    """
    options = options or GreedyOptions()
    per_round = options.per_round(actions)
    rounds = math.ceil(actions / per_round)
    # A round measures its shortlist and, of several actions, their sum; then keeps the new states.
    forward = 1 + rounds * (options.measured(per_round) + 1 + (per_round > 1))
    return Passes(forward, 2 * math.ceil(rounds / options.estimate_every))


def evolution_passes(actions: int, options: EvolutionOptions | None = None) -> Passes:
    """A bound for an evolutionary search of states with ``actions`` actions."""
    options = options or EvolutionOptions()
    measured = options.population * (1 + options.generations)
    return Passes(1 + measured + 2 * actions, 1)
