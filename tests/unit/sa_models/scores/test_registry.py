"""Every name in the registries is that of a function or class, and the recipe takes each."""

from pkgutil import resolve_name

import pytest

from sa_models.materialize import registry as merges
from sa_models.scores import registry as scores
from train.recipe.sections.materialize import MaterializeSection
from train.recipe.sections.penalty import KINDS, PenaltySection
from train.recipe.sections.plan import Budget, PlanSection

WHERE = [
    *KINDS.values(),
    *(place for score in scores.OF_WEIGHTS.values() for place in score),
    *(place for score in scores.OF_TEXT.values() for place in (score.matrix, score.terms)),
    *scores.IMPORTANCES_OF_WEIGHTS.values(),
    *scores.IMPORTANCES_OF_TEXT.values(),
    *merges.PLAIN.values(),
    *merges.GAUGED.values(),
    *merges.MEASURED.values(),
]


@pytest.mark.parametrize("where", sorted(set(WHERE)))
def test_what_is_named_is_there(where: str) -> None:
    assert callable(resolve_name(where))


def test_the_recipe_takes_what_is_named() -> None:
    for kind in KINDS:
        assert PenaltySection(kind=kind).kind == kind
    for merge in (*merges.PLAIN, *merges.GAUGED, *merges.MEASURED):
        assert MaterializeSection(merge=merge).merge == merge
    for score in scores.SCORES:
        assert PlanSection(score=score, budget=Budget(ratio=0.5)).scores_text == (
            score in scores.OF_TEXT
        )
    for strategy in scores.IMPORTANCES:
        section = PlanSection(strategy=strategy, action="remove", budget=Budget(ratio=0.5))
        assert section.searches == (strategy in scores.IMPORTANCES_OF_TEXT)
