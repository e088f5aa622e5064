"""What strategy auto chooses from on a model: units in every structure, and the structures.

The budget is one for all: what a structure saves is not asked of the units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sa_models.plan import SharingPlan
from sa_models.search import structures
from sa_models.search.actions import KINDS, Space, make_full_space, make_space
from sa_models.search.algorithms import GreedyOptions, Passes, greedy_passes
from sa_models.search.budget import Amount, amount_beyond, tie_saves
from train.planning.budget import allowed_units, amount

if TYPE_CHECKING:
    from train.recipe.sections.plan import PlanSection

PAPER = ("q", "k", "v")
SHARES = (("q", "k", "v", "o"), PAPER, ("q", "k"), ("v", "o"))
"""Of a tie: the whole unit; what the paper ties; the maps of a unit; what it writes."""
STRUCTURES_SEARCHED = 2
"""Structures in which units are searched too: those that promise most."""
FULL, REMOVALS, ANY = "ties and removals", "removals alone", "ties of q, k, v and removals"
REBUILT = 3
"""Candidates that are compared after reconstruction: the best ones as they are."""


def asked_of_units(section: PlanSection, config: Any, structure: SharingPlan) -> Amount:
    """What the budget leaves to the units; nothing (``needed`` 0 or less) where it is met."""
    return amount(section, config, structure, amount_beyond)


def full_space(section: PlanSection, config: Any, structure: SharingPlan) -> Space:
    """Ties of all :data:`SHARES`, and removals.

    Counted in units, a unit that is tied twice is one.
    """
    asked, layout = asked_of_units(section, config, structure), structure.layout(config)
    possible = allowed_units(section, structure, layout)
    return make_full_space(
        layout,
        {share: tie_saves(asked.counted, layout, share) for share in SHARES},
        possible.tied,
        possible.removable,
        possible.followers,
        asked.removal_saves,
        asked.needed,
        twice=asked.counted != "units",
    )


def unit_spaces(section: PlanSection, config: Any, structure: SharingPlan) -> dict[str, Space]:
    """The searches of units that are compared: of everything, and the two of strategy loss.

    Those that cannot meet the budget are left out, and a control that is the same search.
    """
    asked, layout = asked_of_units(section, config, structure), structure.layout(config)
    possible = allowed_units(section, structure, layout)
    saved = tie_saves(asked.counted, layout, PAPER), asked.removal_saves
    spaces = {FULL: full_space(section, config, structure)}
    for name, kinds in ((REMOVALS, ("remove",)), (ANY, KINDS)):
        if name == ANY and not saved[0]:
            continue
        spaces[name] = make_space(
            layout,
            kinds,
            PAPER,
            possible.tied,
            possible.removable,
            possible.followers,
            saved,
            asked.needed,
        )
    if not spaces[FULL].targets:
        del spaces[FULL]
    return {name: space for name, space in spaces.items() if space.most() >= space.needed}


def has_structures(section: PlanSection, structure: SharingPlan) -> bool:
    """Whether structures are tried: not beside those of the recipe, nor where units are counted."""
    budget = section.budget
    assert budget is not None
    return structure == SharingPlan() and budget.ratio is None and budget.heads is None


def possible_structures(section: PlanSection, config: Any, spans: bool) -> list[SharingPlan]:
    """Structures of the numbers of followers and KV heads that are tried; any spans."""
    layers = config.num_hidden_layers
    scores = structures.without_scores(layers, section.skip_layers) if spans else None
    return tried_structures(section, config, scores)


def tried_structures(
    section: PlanSection, config: Any, scores: structures.Scores | None
) -> list[SharingPlan]:
    """See :func:`sa_models.search.structures.structures`; without those that save nothing."""
    found = structures.structures(
        config,
        section.skip_layers,
        scores,
        lambda plan: asked_of_units(section, config, plan).needed <= 0,
    )
    return [plan for plan in found if asked_of_units(section, config, plan).given > 0]


def may_have_spans(config: Any) -> bool:
    """Spans do not work with attention dropout (:meth:`SharingPlan.validate`)."""
    return not getattr(config, "attention_dropout", 0.0)


def check_auto(section: PlanSection, config: Any, structure: SharingPlan) -> None:
    """Raises PostshareError when the budget cannot be met, with the nearest that can."""
    asked = asked_of_units(section, config, structure)
    most, what = full_space(section, config, structure).most(), "the units that may change"
    if has_structures(section, structure):
        what = "ties, removals, spans and KV groups"
        for plan in possible_structures(section, config, may_have_spans(config)):
            given = asked_of_units(section, config, plan).given
            most = max(most, given + full_space(section, config, plan).most())
    elif asked.needed <= 0:
        amount(section, config, structure)  # says so
    asked.check(most, what)


def auto_passes(
    section: PlanSection, config: Any, structure: SharingPlan, options: GreedyOptions | None = None
) -> Passes:
    """Passes over the calibration text, at most: those of every search, spans, structures, slopes.

    A slope computes the attention of the changed layers once more, and is counted with the forward
    and backward pass that all of them share.
    """
    spaces = unit_spaces(section, config, structure)
    passes = [greedy_passes(space.largest, options) for space in spaces.values()]
    forward, backward = 0, 1
    if has_structures(section, structure):
        spans = structures.candidates(config.num_hidden_layers, section.skip_layers)
        forward = 2 * len(spans) if may_have_spans(config) else 0
        tried = possible_structures(section, config, may_have_spans(config))
        forward += len(tried) + 1
        left = [full_space(section, config, plan) for plan in tried]
        inside = [greedy_passes(space.largest, options) for space in left if space.needed > 0]
        inside.sort(key=lambda found: found.forward)
        backward += 1 + STRUCTURES_SEARCHED
        passes += inside[-STRUCTURES_SEARCHED:]
    return Passes(
        forward + sum(found.forward for found in passes),
        backward + sum(found.backward for found in passes),
    )
