"""The sharing plan that a recipe asks for: found by scores, weights or chance, shown and drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.scores.registry import IMPORTANCES_OF_WEIGHTS
from sa_models.scores.weight_cosine import best_matches, random_matches
from sa_models.search.pairs import make_plan
from sa_models.spans import ranges
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import converted
from train.common.run_files import SIMILARITY_PICTURE, TIES_PICTURE
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
    if section.action == "drop":  # strategy random
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
    found = make_plan(
        matches,
        layout,
        problem.units,
        section.share,
        problem.skipped_layers(problem.kind),
        released=section.strategy == "released",
    )
    if section.action == "remove":
        found = SharingPlan(removed=tuple(sorted({tie.target for tie in found.ties})))
        if emptied := found.dropped(layout):
            raise PostshareError(
                f"removed: layer {min(emptied)} would lose all its units ({layout.units}); ask for "
                "fewer, or drop whole layers with plan.action=drop"
            )
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


def plan_table(plan: SharingPlan, config: LlamaConfig, requested: float, size: int) -> Table:
    """Requested, effective and stored ratios, parameters and bytes, as a table.

    Args:
        requested: the ratio of heads that the recipe asks for.
        size: bytes of one element in the exported weights.
    """
    savings = plan.savings(config)
    base_bytes, stored_bytes = savings.bytes(size)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    rows: list[tuple[str, str]] = []
    if plan.ties or plan.removed:
        changed = savings.tied_heads + savings.removed_heads
        rows += [
            ("heads asked for", f"{requested:.2%}"),
            (
                "heads that change (effective)",
                f"{savings.effective_ratio:.2%}   {changed} of {savings.heads}",
            ),
        ]
    if plan.removed:
        rows.append(("heads removed", f"{savings.removed_heads} of {savings.heads}"))
    if dropped := plan.dropped(plan.layout(config)):
        what = f"{len(dropped)} of {config.num_hidden_layers}: {ranges(tuple(sorted(dropped)))}"
        rows.append(("layers without attention", what))
    if plan.kv_heads is not None:
        before = HeadLayout.from_config(config).kv_heads
        rows.append(("KV heads of a layer", f"{plan.kv_heads} of {before}"))
    for span in plan.spans:
        what = "attention weights" if span.share == "attention" else "keys and values"
        layers = "layer" if len(span.followers) == 1 else "layers"
        mapped = ", heads matched" if span.head_map else ""
        rows.append(
            (f"{layers} {ranges(span.followers)}", f"{what} of layer {span.leader}{mapped}")
        )
    if plan.basis is not None:
        rows.append(("q, k and v", f"{plan.basis.layers} adjacent layers share a basis"))
    rows += [
        (
            "attention parameters no longer stored",
            f"{savings.stored_ratio:.2%}   {savings.removed_parameters:,} of "
            f"{savings.attention_parameters:,}",
        ),
        ("parameters stored", f"{savings.stored_parameters:,} of {savings.base_parameters:,}"),
        ("bytes stored", f"{stored_bytes:,} of {base_bytes:,}"),
    ]
    if savings.stored_cache != savings.base_cache:
        rows.append(
            (
                "bytes of KV cache for a token",
                f"{savings.stored_cache * size:,} of {savings.base_cache * size:,}",
            )
        )
    for row in rows:
        table.add_row(*row)
    return table


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
