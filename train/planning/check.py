"""Checks of a plan before any work: whether the model can have it, and meet its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.residual_shapes import check_rank
from sa_models.plan import SharingPlan
from sa_models.search.pairs import check_count
from sa_models.search.spans import SpanChoice, best_spans, late_spans
from train.planning.basis import basis_plan
from train.planning.problem import PlanProblem
from train.planning.search.auto_space import check_auto
from train.recipe.rules import check_structure
from train.recipe.sections.plan import MATCHED
from train.recipe.sections.structure import listed_structure

if TYPE_CHECKING:
    from sa_models.weights.safetensors_folder import WeightsFolder
    from train.recipe.recipe import Recipe
    from train.recipe.sections.structure import SpansSection


def check_plan(recipe: Recipe, weights: WeightsFolder) -> None:
    """Refuse a plan that cannot be, before any work.

    Raises:
        PostshareError: what is wrong, see :func:`~train.planning.basis.basis_plan`,
            :func:`sa_models.search.pairs.check_count`,
            :func:`expected_spans`, :func:`check_use` and
            :func:`~train.recipe.rules.check_structure`; or a residual larger than the
            head.
    """
    section, config = recipe.plan, weights.config
    if recipe.residual is not None:
        check_rank(recipe.residual.rank, HeadLayout.from_config(config))
    if section.strategy == "file":
        plan = SharingPlan.load(section.path or "")
        check_structure(recipe, plan, config)
        check_use(recipe, plan)
        return
    structure = listed_structure(recipe.heads, recipe.spans)
    check_structure(recipe, structure, config)
    if recipe.spans is not None and recipe.spans.layers is not None:
        expected_spans(recipe.spans, config.num_hidden_layers)
    if section.strategy != "none" and (recipe.spans is None or recipe.spans.spans is not None):
        # Of spans that are still to be found, nobody knows yet which units they leave.
        check_budget(PlanProblem(section, config, structure))


def check_use(recipe: Recipe, plan: SharingPlan) -> None:
    """Refuse what a plan file leaves without effect.

    Raises:
        PostshareError: the plan changes nothing; a merge without ties; or a shared basis, and a
            merge, a reconstruction or alternatives.
    """
    section, path = recipe.materialize, recipe.plan.path
    if plan == SharingPlan():
        raise PostshareError(f"plan.path: {path} shares and removes nothing; give another plan")
    if section.merge != "copy" and not plan.ties:
        raise PostshareError(
            f"materialize.merge: {path} ties no units, nothing is merged; remove it"
        )
    if plan.basis is None:
        return
    for key, is_set in (
        ("materialize.reconstruct", section.reconstruct),
        ("plan.alternatives", recipe.plan.alternatives),
    ):
        if is_set:
            raise PostshareError(f"{key} does not go with the shared basis of {path}; remove it")


def expected_spans(section: SpansSection, layers: int) -> list[SpanChoice]:
    """The spans of a section that states their number; any, where they are still to be measured.

    Raises:
        PostshareError: the followers asked for do not fit into the layers.
    """
    assert section.layers is not None
    limits = (section.layers, section.max_followers, section.skip_layers)
    if section.strategy == "late":
        return late_spans(layers, *limits)
    return best_spans(lambda leader, followers: 0.0, layers, *limits)


def check_budget(problem: PlanProblem) -> None:
    """Raises PostshareError when the budget cannot be met; see :mod:`train.planning.problem`."""
    strategy, section = problem.section.strategy, problem.section
    if strategy in MATCHED and section.action != "drop" and not section.uniform:
        skipped = problem.skipped_layers(problem.kind)
        check_count(problem.units, problem.layout, skipped, section.action == "remove")
    elif strategy == "basis":
        basis_plan(problem)
    elif strategy == "auto":
        check_auto(problem)
    else:
        _ = problem.space
