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
LAYERS, WITH_LAYERS = "whole layers alone", "removals and whole layers"
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
    )


def unit_spaces(problem: PlanProblem) -> dict[str, Space]:
    """The searches of units that are compared: of everything and the two of strategy loss, or where
    nothing is tied of removals alone; and those that may drop whole layers of attention.

    Those that cannot meet the budget are left out, and a control that is the same search.
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
            uniform=problem.in_each_layer,
        )
    if not spaces[FULL].targets:
        del spaces[FULL]
    spaces |= layer_spaces(problem)
    return {name: space for name, space in spaces.items() if space.most() >= space.needed}


def layer_spaces(problem: PlanProblem) -> dict[str, Space]:
    """Whole layers alone, and beside removals of single units.

    Counted in units only the first, where they come to whole layers: no more may change than the
    budget asks for. None where all layers lose as many.
    """
    if problem.section.uniform:
        return {}
    asked, allowed = problem.remaining, problem.allowed
    counts_units = asked.counted == "units"
    if counts_units and asked.needed % asked.drop_saves:
        return {}
    return {
        name: make_space(
            problem.layout,
            kinds,
            PAPER,
            (),
            allowed.removable,
            (),
            (0, asked.removal_saves),
            asked.needed,
            problem.droppable,
            asked.drop_saves,
        )
        for name, kinds in ((LAYERS, ("drop",)), (WITH_LAYERS, ("remove", "drop")))
        if not (counts_units and name == WITH_LAYERS)
    }


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
    spaces = [full_space(problem), *layer_spaces(problem).values()]
    most = max(space.most() for space in spaces)
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
    passes = [greedy_passes(space.largest, options) for space in unit_spaces(problem).values()]
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
