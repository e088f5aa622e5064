"""The sharing plan that a recipe asks for: found by scores, weights or chance, shown and drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch

from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.scores.registry import IMPORTANCES_OF_WEIGHTS
from sa_models.scores.weight_cosine import best_matches, random_matches
from sa_models.search.pairs import make_plan, select_removals
from sa_models.spans import ranges
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import converted
from train.common.run_files import PLAN_FILE, SIMILARITY_PICTURE, TIES_PICTURE
from train.evaluation.figures import Figures
from train.planning.basis import basis_plan
from train.planning.problem import PlanProblem, least_important_of
from train.planning.scores import CalibrationText, score_units

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from train.recipe.recipe import PlanSection


def find_ties(
    problem: PlanProblem, weights: WeightsFolder, text: CalibrationText | None = None
) -> tuple[SharingPlan, torch.Tensor | None]:
    """The plan of a recipe, and the scores (units, units) that it was chosen by, if any.

    Args:
        weights: of the base model; only its attention weights are read.
        text: needed where ``problem.section.scores_text``.

    Raises:
        PostshareError: see :func:`~train.planning.check.check_plan` and
            :func:`~train.planning.scores.score_units`.
    """
    section, structure, layout = problem.section, problem.structure, problem.layout
    if section.strategy == "none":
        return structure, None
    if section.strategy == "file":
        plan = SharingPlan.load(section.path or "")
        plan.validate(weights.config)
        return plan, None
    if section.strategy == "basis":
        return basis_plan(problem), None
    if section.strategy in IMPORTANCES_OF_WEIGHTS:
        measure = resolve_name(IMPORTANCES_OF_WEIGHTS[section.strategy])
        importance = measure(converted(weights, structure), layout)
        plan = replace(structure, removed=least_important_of(problem, importance))
        plan.validate(weights.config)
        return plan, None
    if section.action == "drop" or section.uniform:  # strategy random
        draw = torch.Generator().manual_seed(section.seed)
        chance = torch.rand(layout.layers, layout.units, generator=draw)
        plan = replace(structure, removed=least_important_of(problem, chance))
        plan.validate(weights.config)
        return plan, None
    scores, followers = None, structure.leader_of()
    if section.strategy == "random":
        matches = random_matches(layout, section.seed, without=followers)
    else:
        pooled = converted(weights, SharingPlan(kv_heads=structure.kv_heads))
        scores = score_units(section, pooled, layout, text)
        matches = best_matches(scores, layout, without=followers)
    skipped = problem.skipped_layers(problem.kind)
    if section.action == "remove":
        found = SharingPlan(removed=select_removals(matches, layout, problem.units, skipped))
    else:
        released = section.strategy == "released"
        found = make_plan(matches, layout, problem.units, section.share, skipped, released=released)
    plan = replace(found, kv_heads=structure.kv_heads, spans=structure.spans)
    plan.validate(weights.config)
    return plan, scores


def draw_plan(
    plan: SharingPlan,
    scores: torch.Tensor | None,
    layout: HeadLayout,
    section: PlanSection,
    folder: Path,
) -> list[Path]:
    """Write the pictures of a plan into the run folder; returns their paths."""
    from train.planning.plan_maps import save_similarity, save_ties

    written: list[Path] = []
    if scores is not None:
        save_similarity(scores, layout, section.score, folder / SIMILARITY_PICTURE)
        written.append(folder / SIMILARITY_PICTURE)
    if plan.ties or plan.removed:
        save_ties(plan, layout, folder / TIES_PICTURE)
        written.append(folder / TIES_PICTURE)
    return written


def plan_lines(plan: SharingPlan, config: LlamaConfig, requested: float, size: int) -> list[str]:
    """What a plan changes and saves, for a terminal of 80 columns.

    Args:
        requested: the ratio of units that the recipe asks for.
        size: bytes of one element in the exported weights.
    """
    savings, layout = plan.savings(config), plan.layout(config)
    rows: list[tuple[str, str]] = []
    tied, removed = savings.tied_units, savings.removed_units
    if plan.ties or plan.removed:
        what = f"{tied} tied, {removed} removed" if tied and removed else ""
        what = what or ("tied" if tied else "removed")
        rows.append(
            (
                "plan",
                f"{tied + removed} of {savings.units} {layout.unit_name} change, "
                f"{savings.effective_ratio:.2%} (asked {requested:.2%}): {what}",
            )
        )
    if dropped := plan.dropped(layout):
        named = ranges(tuple(sorted(dropped)))
        rows.append(
            ("layers", f"{len(dropped)} of {config.num_hidden_layers} without attention: {named}")
        )
    if (units := plan.stock_units(config)) is not None:
        left = layout.with_units(units)
        sizes = ", ".join(map(str, left.tensor_parallel))
        text = f"{left.stock_class} of {left.heads} heads a layer (tensor parallel {sizes})"
        rows.append(("stock", text))
    if plan.kv_heads is not None:
        before = HeadLayout.from_config(config).kv_heads
        rows.append(("KV heads", f"{plan.kv_heads} of {before} in a layer, mean-pooled"))
    if plan.spans:
        rows.append(("spans", _spans(plan)))
    if plan.basis is not None:
        rows.append(("basis", f"q, k and v of {plan.basis.layers} adjacent layers share one"))
    figures = Figures.of_plan(savings, size, config.max_position_embeddings).rows()
    rows += [
        (
            "saved",
            f"{savings.stored_ratio:.2%} of the attention parameters, "
            f"{savings.removed_parameters:,} of {savings.attention_parameters:,}",
        ),
        ("weights", figures["weight bytes"].replace(", ", " bytes, ", 1)),
        ("cache", figures["cache bytes per token"].replace(", ", " bytes per token, ", 1)),
    ]
    return [f"{name:<10}{text}" for name, text in rows]


def _spans(plan: SharingPlan) -> str:
    """Leaders and followers in one line; where that is too long, their number."""
    shared = {"attention": "attention weights", "kv": "keys and values"}
    found = [
        f"{span.leader} -> {ranges(span.followers)} ({shared[span.share]}"
        f"{', heads matched' if span.head_map else ''})"
        for span in plan.spans
    ]
    line = ", ".join(found)
    return line if len(line) <= 70 else f"{found[0]} and {len(found) - 1} more, see {PLAN_FILE}"


def requested_ratio(section: PlanSection, plan: SharingPlan, layout: HeadLayout) -> float:
    """The share of heads that the recipe asks for (of a plan file: those that it names)."""
    units = layout.layers * layout.units
    budget = section.budget
    if budget is not None and budget.ratio is not None:
        return budget.ratio
    if budget is not None and budget.heads is not None:
        return budget.heads / (layout.layers * layout.heads)
    # A plan file, a budget that asks for no number of heads, or no ties at all.
    return len({*(tie.target for tie in plan.ties), *plan.removed}) / units
