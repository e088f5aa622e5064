"""The search space of strategy auto: units in every structure, and the structures.

The budget is one for all: what a structure saves is not asked of the units.
"""

from __future__ import annotations

import math
from functools import partial

from sa_models.plan import SharingPlan
from sa_models.search import structures
from sa_models.search.actions import KINDS, Space, make_full_space, make_space
from sa_models.search.algorithms import GreedyOptions, Passes, greedy_passes
from sa_models.search.budget import tie_saves
from train.planning.problem import PlanProblem

PAPER = ("q", "k", "v")
SHARES = (("q", "k", "v", "o"), PAPER, ("q", "k"), ("v", "o"))
"""Of a tie: the whole unit; what the paper ties; the maps of a unit; what it writes."""
STRUCTURES_SEARCHED = 2
"""Structures in which units are searched too: those that promise most."""
FULL, REMOVALS, ANY = "ties and removals", "removals alone", "ties of q, k, v and removals"
LAYERS = "whole layers alone"
SLACK = 0.1
"""Of what the best plan lost: how far behind the first search that of whole layers may fall."""
PART = 4
"""Spans are measured on every so many-th block of the calibration text first."""
REBUILT = 3
"""Candidates that are compared after reconstruction: the best ones as they are."""
HOPELESS = 3
"""A plan that costs more than so many times the best is not reconstructed: that has taken two
thirds of a rise at most."""


def tied_shares(problem: PlanProblem) -> tuple[tuple[str, ...], ...]:
    """The sets of projections that ties may share: none, where the objective is not bytes alone."""
    return SHARES if problem.section.may_tie else ()


def full_space(problem: PlanProblem) -> Space:
    """Removals, and ties of all :func:`tied_shares`.

    Counted in units, a unit that is tied twice is one.
    """
    asked, layout, allowed = problem.remaining, problem.layout, problem.allowed
    return make_full_space(
        layout,
        {share: tie_saves(asked.counted, layout, share) for share in tied_shares(problem)},
        allowed.tied,
        allowed.removable,
        allowed.followers,
        asked.removal_saves,
        problem.needed_of(asked),
        twice=asked.counted != "units",
        uniform=problem.in_each_layer,
        emptiable=_emptiable(problem),
        drop_saves=asked.drop_saves,
    )


def _emptiable(problem: PlanProblem) -> list[int]:
    """Layers that may lose all their units one by one; none where all layers keep as many."""
    return [] if problem.section.uniform else problem.droppable


def unit_spaces(problem: PlanProblem) -> dict[str, Space]:
    """The searches of units that are compared: of everything and of removals alone; where ties are
    allowed, of ties as strategy loss offers them as well.

    A layer may lose all its units. Spaces that cannot meet the budget are left out, and a control
    that is the same search.
    """
    asked, layout, allowed = problem.remaining, problem.layout, problem.allowed
    saved = tie_saves(asked.counted, layout, PAPER), asked.removal_saves
    spaces = {FULL: full_space(problem)}
    for name, kinds in ((REMOVALS, ("remove",)), (ANY, KINDS)):
        if name == ANY and not (saved[0] and problem.section.may_tie):
            continue
        spaces[name] = make_space(
            layout,
            kinds,
            PAPER,
            allowed.tied,
            allowed.removable,
            allowed.followers,
            saved,
            problem.needed_of(asked),
            drop_saves=asked.drop_saves,
            uniform=problem.in_each_layer,
            emptiable=_emptiable(problem),
        )
    if not spaces[FULL].targets:
        del spaces[FULL]
    return _possible(spaces)


def layer_spaces(problem: PlanProblem) -> dict[str, Space]:
    """The search that drops whole layers at once.

    None where a number of units is asked for that does not come to whole layers, where all layers
    lose as many, and where a layer has one unit, so that the search of removals is the same.
    """
    asked = problem.remaining
    splits = asked.counted == "units" and asked.needed % asked.drop_saves
    if problem.section.uniform or splits or problem.layout.units == 1:
        return {}
    space = make_space(
        problem.layout,
        ("drop",),
        PAPER,
        (),
        (),
        (),
        (0, 0),
        asked.needed,
        problem.droppable,
        asked.drop_saves,
    )
    return _possible({LAYERS: space})


def _possible(spaces: dict[str, Space]) -> dict[str, Space]:
    """Those that can meet the budget."""
    return {name: space for name, space in spaces.items() if space.most() >= space.needed}


def has_structures(problem: PlanProblem) -> bool:
    """Whether structures are tried: not beside those of the recipe, nor where units are counted."""
    return problem.structure == SharingPlan() and problem.budget.counted != "units"


def possible_structures(problem: PlanProblem) -> list[PlanProblem]:
    """The problem within structures of the numbers of followers and KV heads that are tried; any
    spans."""
    layers, skipped = problem.config.num_hidden_layers, problem.section.skipped
    any_spans = partial(structures.any_spans, layers, skipped)
    return tried_structures(problem, any_spans if may_have_spans(problem) else None)


def tried_structures(problem: PlanProblem, spans: structures.Spans | None) -> list[PlanProblem]:
    """The problem within each structure of :func:`sa_models.search.structures.structures`; without
    those that save nothing, or with `plan.uniform` have no stock form."""
    found = structures.structures(
        problem.config,
        problem.section.skipped,
        spans,
        lambda plan: problem.within(plan).remaining.needed <= 0,
    )
    within = [problem.within(plan) for plan in found]
    return [inside for inside in within if inside.remaining.given > 0 and inside.has_stock_heads]


def may_have_spans(problem: PlanProblem) -> bool:
    """Spans do not work with attention dropout (:meth:`SharingPlan.validate`), and are in some
    layers only."""
    return not getattr(problem.config, "attention_dropout", 0.0) and not problem.section.uniform


def check_auto(problem: PlanProblem) -> None:
    """Raises PostshareError when the budget cannot be met, with the nearest that can."""
    problem.check_stock_heads()
    asked = problem.remaining
    most = full_space(problem).most()
    what = "ties, removals" if problem.section.may_tie else "removals (ties: plan.objective=bytes)"
    what = "as many removals in every layer" if problem.section.uniform else what
    if has_structures(problem):
        what += " and KV groups" if problem.section.uniform else ", spans and KV groups"
        for inside in possible_structures(problem):
            most = max(most, inside.remaining.given + full_space(inside).most())
    else:
        problem.check_uniform()
        asked = problem.required
    asked.check(most, what)


def auto_passes(problem: PlanProblem, options: GreedyOptions | None = None) -> Passes:
    """Passes over the calibration text, at most: those of every search, spans, structures, slopes.

    A slope computes the attention of the changed layers once more, and is counted with the forward
    and backward pass that all of them share.
    """
    config, section = problem.config, problem.section
    spaces = unit_spaces(problem) | layer_spaces(problem)
    passes = [greedy_passes(space.largest, options) for space in spaces.values()]
    forward, backward = 0, 1
    if has_structures(problem):
        spans = structures.candidates(config.num_hidden_layers, section.skipped)
        each = 2 * len(spans) if may_have_spans(problem) else 0
        forward = each + math.ceil(each / PART)
        tried = possible_structures(problem)
        forward += len(tried) + 1
        left = [full_space(inside) for inside in tried]
        inside = [greedy_passes(space.largest, options) for space in left if space.needed > 0]
        inside.sort(key=lambda found: found.forward)
        backward += 1 + STRUCTURES_SEARCHED
        passes += inside[-STRUCTURES_SEARCHED:]
    return Passes(
        forward + sum(found.forward for found in passes),
        backward + sum(found.backward for found in passes),
    )
