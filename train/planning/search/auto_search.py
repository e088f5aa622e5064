"""Strategy auto: the plan that costs least, whatever it is made of, under one budget.

Units are searched among removals, which may empty a layer, and among whole layers; where the
objective is bytes alone, among ties of several sets of projections as well, and, as controls, among
what strategy loss offers. Then structures are measured (spans, fewer KV heads), and units are
searched in the few that promise most; a structure is left out, and the search in one given up, as
soon as its parts are expected to cost what the best plan does. Whatever costs least wins
(:mod:`train.planning.search.objective`): a control too. Where the recipe reconstructs, the best are
then compared after it (:mod:`train.planning.search.auto_rebuild`).

All losses are measured on one text, and of all of them the slope of the whole change is taken off
(:mod:`sa_models.scores.slope`), structures included, which are charged with it and never credited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from sa_models.calibration.partial_forward import Batch, rows_of
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.scores.slope import Change, slopes
from sa_models.search import structures as plan_structures
from sa_models.search.actions import Action, Space, State, as_plan
from sa_models.search.algorithms import SearchResult, greedy
from sa_models.search.measured_loss import MeasuredLoss, state_key
from sa_models.search.ranking import Agreement, EstimatedRanking, Estimator
from sa_models.search.spans import LossOf, MeasuredSpans, SpanChoice
from sa_models.weights.structure import convert
from train.common.progress import bar
from train.common.run_files import SEARCH_CACHE
from train.planning.problem import PlanProblem
from train.planning.search import auto_space
from train.planning.search.auto_result import AutoResult, Candidate, Point
from train.planning.search.auto_space import FULL, PART, REMOVALS, STRUCTURES_SEARCHED
from train.planning.search.loss_search import estimate_bar
from train.planning.search.objective import cost, most_rise, saved_share

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

IsHopeless = Callable[[int, float], bool]
"""Called with what a search has saved and its loss: whether it is to be given up."""


def search_auto(
    problem: PlanProblem,
    model: LlamaForCausalLM,
    batches: Sequence[Batch],
    folder: Path,
    spans: bool = True,
) -> AutoResult:
    """Search everything that strategy auto may do.

    Args:
        model: with the problem's structure, fp32, in evaluation mode, on the device that is to
            measure.
        batches: calibration text, on that device.
        folder: of the run; what has been measured is kept there, and used by a second start.
        spans: whether spans may be tried, which have neither a dense form nor GGUF.

    Raises:
        PostshareError: a budget that cannot be met.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    search = _Search(problem, MeasuredLoss(model, batches, folder / SEARCH_CACHE), spans)
    candidates = search.units(search.own, auto_space.unit_spaces(problem))
    candidates += search.layers(candidates)
    tried: list[Point] = []
    if auto_space.has_structures(problem):
        tried = search.structures(candidates)
        candidates += search.inside(tried, candidates)
    if not candidates:
        raise PostshareError(
            "no plan of strategy auto meets the budget without spans, which the forms of "
            "export.formats cannot have; lower plan.budget, or set export.formats=[compact]"
        )
    base = search.own.measured(frozenset())

    def order(candidate: Candidate) -> tuple[float, float]:
        rise = candidate.expected - base
        return cost(problem, candidate.plan, rise), rise

    return AutoResult(
        search.point("dense", search.own, frozenset(), base, 0.0),
        tuple(sorted(candidates, key=order)),
        tuple(tried),
        sum(len(batch["input_ids"]) for batch in batches),
        search.passes,
        search.estimates + sum(place.estimator.made for place in search.places),
        auto_space.auto_passes(problem),
        time.perf_counter() - started,
        left_out=tuple(search.left_out),
        given_up=tuple(search.given_up),
    )


@dataclass
class _Place:
    """A structure in which units are searched.

    Attributes:
        structure: KV heads and spans, of the recipe or that are tried.
        name: of what is added to the name of a search; empty for the recipe's own structure.
    """

    structure: SharingPlan
    measured: MeasuredLoss
    estimator: Estimator
    name: str = ""


@dataclass
class _Search:
    """The parts of the search, on one model and text."""

    problem: PlanProblem
    measured: MeasuredLoss
    spans: bool
    places: list[_Place] = field(default_factory=list)
    estimates: int = 0
    """For slopes."""
    part: MeasuredLoss | None = None
    """On a part of the text, see :meth:`_on_part`."""
    left_out: list[str] = field(default_factory=list)
    """Structures that were not measured, as their parts cost too much."""
    given_up: list[str] = field(default_factory=list)
    """Searches of whole layers, or in a structure, that fell behind."""

    def __post_init__(self) -> None:
        self.own = self._place(self.problem.structure, self.measured)

    def _place(self, structure: SharingPlan, measured: MeasuredLoss, name: str = "") -> _Place:
        shares = auto_space.tied_shares(self.problem)
        estimator = Estimator(measured, shares, structure.leader_of(), estimate_bar)
        place = _Place(structure, measured, estimator, name)
        self.places.append(place)
        return place

    def units(
        self, place: _Place, spaces: dict[str, Space], is_hopeless: IsHopeless | None = None
    ) -> list[Candidate]:
        """A greedy search in every space; without those that were given up."""
        searched: list[tuple[str, SearchResult, Agreement | None]] = []
        for name, space in spaces.items():
            ranking = EstimatedRanking(
                space, place.measured, place.structure.leader_of(), place.estimator
            )
            title = f"{name}{place.name}"
            with bar(f"searching {title}") as advance:
                found = greedy(
                    space, place.measured, ranking, progress=advance, is_hopeless=is_hopeless
                )
            if space.is_met(found.state):
                searched.append((title, found, ranking.agreement))
            else:
                self.given_up.append(title)
        place.measured.restore()
        paths = [_states(found) for _, found, _ in searched]
        known = self.slopes([(place, state) for path in paths for state in path])
        return [
            Candidate(
                name,
                tuple(
                    self.point(name, place, state, step.loss, known[place.structure, state])
                    for state, step in zip(path, found.path, strict=True)
                ),
                found,
                agreement,
            )
            for (name, found, agreement), path in zip(searched, paths, strict=True)
        ]

    def layers(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The search of whole layers, given up where it falls far behind that of units.

        Args:
            candidates: of the searches of units.
        """
        found: list[Candidate] = []
        for name, space in auto_space.layer_spaces(self.problem).items():
            own = self.problem.structure
            behind = self._is_behind(own, space, candidates, candidates, auto_space.SLACK)
            found += self.units(self.own, {name: space}, behind)
        return found

    def point(self, origin: str, place: _Place, state: State, loss: float, slope: float) -> Point:
        layout = place.structure.layout(self.problem.config)
        units = as_plan(state, layout)
        plan = replace(units, kv_heads=place.structure.kv_heads, spans=place.structure.spans)
        saved = self._saved(plan)
        return Point(origin, plan, saved, loss, slope, place.structure != self.problem.structure)

    def _saved(self, plan: SharingPlan) -> int:
        """In what the budget counts."""
        savings, counted = plan.savings(self.problem.config), self.problem.budget.counted
        if counted == "units":
            return savings.tied_units + savings.removed_units
        if counted == "cache":
            return savings.base_cache - savings.stored_cache
        return savings.removed_parameters

    # --- structures -------------------------------------------------------------------------------

    def structures(self, candidates: Sequence[Candidate]) -> list[Point]:
        """Every structure that is tried, measured alone.

        Args:
            candidates: of the searches of units.
        """
        spans = self.spans and auto_space.may_have_spans(self.problem)
        best = partial(self._best_spans, candidates) if spans else None
        within = auto_space.tried_structures(self.problem, best)
        found = [inside.structure for inside in within]
        losses: list[float] = []
        with bar(f"measuring {len(found)} structures") as advance:
            for done, plan in enumerate(found, start=1):
                losses.append(self._loss(plan, self.measured))
                advance(done, len(found))
        places = [_Tried(plan, self._converted(plan)) for plan in found]
        known = self.slopes([(place, frozenset()) for place in places])
        return [
            Point("structure", plan, self._saved(plan), loss, known[plan, frozenset()], True)
            for plan, loss in zip(found, losses, strict=True)
        ]

    def _best_spans(
        self, candidates: Sequence[Candidate], share: str, followers: int
    ) -> list[SpanChoice] | None:
        """By the loss; None where the spans alone are expected to cost too much. What has been
        measured for another number is in the cache."""
        layers, skipped = self.problem.config.num_hidden_layers, self.problem.section.skipped
        limit = inf
        if followers > 1:  # the best of one is measured in any case: it says what spans cost here
            some = plan_structures.any_spans(layers, skipped, share, followers)
            limit = self._most_rise(plan_structures.span_plan(some, share), candidates, candidates)

        def losses(on: MeasuredLoss) -> tuple[LossOf, float]:
            def loss_of(leader: int, which: tuple[int, ...]) -> float:
                choice = SpanChoice(leader, which)
                return self._loss(plan_structures.span_plan([choice], share), on)

            return loss_of, on(frozenset())

        many = "1 follower" if followers == 1 else f"{followers} followers"
        with bar(f"measuring spans ({share}, {many})") as advance:
            measured = MeasuredSpans(
                *losses(self.measured),
                layers,
                plan_structures.MAX_FOLLOWERS,
                skipped,
                advance,
                losses(self._on_part()),
            )
            found = measured.best_below(followers, limit)
        if found is None:
            self.left_out.append(f"spans with {followers} followers ({share})")
        return found

    def _most_rise(
        self, structure: SharingPlan, found: Sequence[Candidate], every: Sequence[Candidate]
    ) -> float:
        """The rise of the loss at which a structure is no better than the best candidate.

        The units that meet the rest of the budget are expected to cost, and to save, what as many
        of the first search of units do: in a structure that has changed their inputs, no less.

        Args:
            found: of the searches of units.
            every: those, and structures that meet the budget alone.
        """
        if not every:
            return inf
        left, of = self.problem.within(structure).remaining.needed, attrgetter("expected")
        limit = self._same_cost(structure, left, found, every, of)
        return limit - plan_structures.rise_at(self._first_path(found, of), left)

    def _same_cost(
        self,
        structure: SharingPlan,
        left: int,
        found: Sequence[Candidate],
        every: Sequence[Candidate],
        of: Callable[[Point], float],
    ) -> float:
        """The rise of the loss at which a structure with its units costs what the best plan does.

        Args:
            left: what the structure leaves to units, in what the budget counts.
            of: the loss of a point, with or without its slope.
        """
        base = self.measured(frozenset())
        best = min(cost(self.problem, c.plan, of(c.points[-1]) - base) for c in every)
        share = saved_share(self.problem, structure)
        if left > 0:  # with as much of the first search as the structure leaves
            points = found[0].points if found else ()
            enough = next((point.plan for point in points if point.saved >= left), None)
            units = 1.0 if enough is None else saved_share(self.problem, enough)
            share = min(1.0, share + units)
        return most_rise(best, share)

    def _first_path(
        self, found: Sequence[Candidate], of: Callable[[Point], float]
    ) -> list[tuple[int, float]]:
        """What the first search of units had saved, and lost, from its beginning on."""
        base = self.measured(frozenset())
        points = found[0].points if found else ()
        return [(0, 0.0), *((point.saved, of(point) - base) for point in points)]

    def _on_part(self) -> MeasuredLoss:
        """The model on a part of the text, which says what need not be measured on all of it."""
        if self.part is None:
            rows = rows_of(self.measured.batches)[::PART]
            self.part = MeasuredLoss(self._original(), rows, self.measured.cache.path)
        return self.part

    @property
    def passes(self) -> float:
        """Forward passes over the calibration text, in whole models."""
        on_part = self.part.passes / PART if self.part is not None else 0.0
        return on_part + sum(place.measured.passes for place in self.places)

    def _loss(self, plan: SharingPlan, on: MeasuredLoss) -> float:
        self._original()
        return on.of_structure(plan)

    def _converted(self, plan: SharingPlan) -> LlamaForCausalLM:
        self._original()
        return convert(self.measured.model, plan).eval()

    def inside(self, tried: Sequence[Point], candidates: Sequence[Candidate]) -> list[Candidate]:
        """The structures that meet the budget alone, and searches of units in those that promise
        most: those that are furthest from costing what the best plan does (:meth:`_most_rise`).
        """
        within = {p.plan: self.problem.within(p.plan) for p in tried}
        meets = {plan: inside.remaining.needed <= 0 for plan, inside in within.items()}
        alone = [Candidate("structure alone", (p,)) for p in tried if meets[p.plan]]
        base, every = self.measured(frozenset()), [*candidates, *alone]
        margins = {
            p: self._most_rise(p.plan, candidates, every) - (p.expected - base)
            for p in tried
            if not meets[p.plan]
        }
        promising = sorted((p for p in margins if margins[p] > 0), key=lambda p: -margins[p])
        searched: list[Candidate] = []
        tries = 0
        for point in promising:
            space = auto_space.full_space(within[point.plan])
            if tries == STRUCTURES_SEARCHED or space.most() < space.needed:
                continue
            tries += 1
            behind = self._is_behind(point.plan, space, candidates, every)
            searched += self._inside(point.plan, space, behind)
        return alone + searched

    def _is_behind(
        self,
        structure: SharingPlan,
        space: Space,
        found: Sequence[Candidate],
        every: Sequence[Candidate],
        slack: float = 0.0,
    ) -> IsHopeless | None:
        """Whether a search in a structure costs too much so far: what it has lost, and what the
        rest cost the first search of units, come to what the best plan lost.

        Slopes are left in: those of a search are known when it has ended.

        Args:
            slack: how much more that may be, as a share of it.
        """
        if not found:
            return None
        base, of = self.measured(frozenset()), attrgetter("loss")
        limit = self._same_cost(structure, space.needed, found, every, of)
        limit += slack * abs(limit)
        path = self._first_path(found, of)
        whole = plan_structures.rise_at(path, space.needed)

        def is_behind(saved: int, loss: float) -> bool:
            rest = whole - plan_structures.rise_at(path, saved)
            return loss - base + rest >= limit

        return is_behind

    def _inside(
        self, structure: SharingPlan, space: Space, is_hopeless: IsHopeless | None
    ) -> list[Candidate]:
        model = self._converted(structure)
        file = self.measured.cache.path
        measured = MeasuredLoss(model, self.measured.batches, file)
        place = self._place(structure, measured, f" in {_name(structure)}")
        return self.units(place, {FULL if space.targets else REMOVALS: space}, is_hopeless)

    # --- slopes -----------------------------------------------------------------------------------

    def slopes(
        self, wanted: Sequence[tuple[_Place | _Tried, State]]
    ) -> dict[tuple[SharingPlan, State], float]:
        """The slope of every structure with a state, against the model without any change."""
        cache, own = self.measured.cache, self.problem.structure
        layers = self.problem.config.num_hidden_layers
        missing: dict[str, Change] = {}
        for place, state in wanted:
            key = f"slope {_name(place.structure)} {state_key(state)}"
            if key not in cache:
                changed = frozenset(action.target[0] for action in state)
                if place.structure != own:
                    changed |= plan_structures.changed_layers(place.structure, layers)
                missing[key] = Change(partial(self._changed, place, state), changed)
        if missing:
            self.estimates += 1
            with bar("taking slopes off") as advance:
                found = slopes(self._original, [*missing.values()], self.measured.batches, advance)
            self._original()
            for key, slope in zip(missing, found, strict=True):
                cache.put(key, slope)
        return {
            (place.structure, state): cache[f"slope {_name(place.structure)} {state_key(state)}"]
            for place, state in wanted
        }

    def _original(self) -> LlamaForCausalLM:
        for place in self.places:  # they share weights
            place.measured.restore()
        return self.measured.model

    def _changed(self, place: _Place | _Tried, state: State) -> LlamaForCausalLM:
        for other in self.places:
            if other is not place:
                other.measured.restore()
        return place.model if isinstance(place, _Tried) else place.measured.at(state)


@dataclass(frozen=True)
class _Tried:
    """A structure in which no units are searched."""

    structure: SharingPlan
    model: LlamaForCausalLM


def _states(found: SearchResult) -> list[State]:
    """The state after every step of a path."""
    taken: set[Action] = set()
    states = []
    for step in found.path:
        taken |= set(step.actions)
        states.append(frozenset(taken))
    return states


def _name(structure: SharingPlan) -> str:
    """A structure in a few words."""
    parts = [str(span) for span in structure.spans]
    if structure.kv_heads is not None:
        parts.append(f"{structure.kv_heads} KV heads")
    return ", ".join(parts) or "no structure"
