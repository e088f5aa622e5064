"""The plan stage: find the sharing plan that a recipe asks for, show it, draw it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from sa_models import selection
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.similarity import best_matches, random_matches, unit_scores
from sa_models.weights import WeightsFolder

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from train.recipe import PlanSection

SIMILARITY_PICTURE = "plan-similarity.png"
TIES_PICTURE = "plan-ties.png"


def check_plan(section: PlanSection, weights: WeightsFolder) -> None:
    """Refuse a budget that cannot be met, or a plan file that does not fit, before any work.

    Raises:
        PostshareError: what is wrong, see :func:`sa_models.selection.units_to_tie` and
            :meth:`SharingPlan.validate`.
    """
    if section.strategy == "file":
        SharingPlan.load(section.path or "").validate(weights.config)
    elif section.strategy != "none":
        layout = HeadLayout.from_config(weights.config)
        selection.units_to_tie(_budget(section), layout, section.skip_layers)


def find_plan(
    section: PlanSection, weights: WeightsFolder
) -> tuple[SharingPlan, torch.Tensor | None]:
    """The plan of a recipe, and the scores (units, units) that it was chosen by, if any.

    Args:
        weights: of the base model; only its attention weights are read.

    Raises:
        PostshareError: see :func:`check_plan`.
    """
    check_plan(section, weights)
    layout = HeadLayout.from_config(weights.config)
    if section.strategy == "file":
        return SharingPlan.load(section.path or ""), None
    scores = None
    if section.strategy == "random":
        matches = random_matches(layout, section.seed)
    else:
        scores = score_with_progress(weights, layout, section.score)
        matches = best_matches(scores, layout)
    plan = selection.make_plan(
        matches,
        layout,
        _budget(section),
        section.share,
        section.skip_layers,
        released=section.strategy == "released",
    )
    plan.validate(weights.config)
    return plan, scores


def _budget(section: PlanSection) -> selection.Budget:
    assert section.budget is not None
    return selection.Budget(ratio=section.budget.ratio, heads=section.budget.heads)


def score_with_progress(weights: WeightsFolder, layout: HeadLayout, score: str) -> torch.Tensor:
    """:func:`unit_scores` with a progress bar on stderr, when there is a terminal to show it."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"comparing units ({score})")
        return unit_scores(
            weights, layout, score, lambda done, n: progress.update(task, completed=done, total=n)
        )


def draw_plan(
    plan: SharingPlan,
    scores: torch.Tensor | None,
    layout: HeadLayout,
    section: PlanSection,
    folder: Path,
) -> list[Path]:
    """Write the pictures of a plan into the run folder; returns their paths."""
    from train.pictures import save_similarity, save_ties

    written = []
    if scores is not None:
        save_similarity(scores, layout, section.score, folder / SIMILARITY_PICTURE)
        written.append(folder / SIMILARITY_PICTURE)
    save_ties(plan, layout, folder / TIES_PICTURE)
    return [*written, folder / TIES_PICTURE]


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
    for label, value in (
        ("heads asked for", f"{requested:.2%}"),
        (
            "heads that change (effective)",
            f"{savings.effective_ratio:.2%}   {savings.tied_heads} of {savings.heads}",
        ),
        (
            "attention parameters no longer stored",
            f"{savings.stored_ratio:.2%}   {savings.tied_parameters:,} of "
            f"{savings.attention_parameters:,}",
        ),
        (
            "parameters stored",
            f"{savings.stored_parameters:,} of {savings.base_parameters:,}",
        ),
        ("bytes stored", f"{stored_bytes:,} of {base_bytes:,}"),
    ):
        table.add_row(label, value)
    return table


def requested_ratio(section: PlanSection, plan: SharingPlan, layout: HeadLayout) -> float:
    """The share of heads that the recipe asks for (of a plan file: those that it names)."""
    units = layout.layers * layout.units
    if section.budget is None:
        return len({tie.target for tie in plan.ties}) / units
    if section.budget.ratio is not None:
        return section.budget.ratio
    assert section.budget.heads is not None
    return section.budget.heads / (layout.layers * layout.heads)
