"""Which keys of a plan section go together: the strategies that choose units by what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.recipe.sections.plan import PlanSection

MATCHED = ("cosine", "released", "random")
"""Strategies that give every target a source, by their weights or by chance."""
SCORED = ("cosine", "released")
"""Strategies that compare units by `plan.score`."""
REMOVING = ("magnitude", "gradient")
"""Strategies that choose units to remove."""
MEASURED = ("loss", "auto")
"""Strategies that choose changes by the loss on calibration text."""
CHOOSING = (*MATCHED, *MEASURED, *REMOVING, "basis")
"""Strategies that need a budget."""


def check_choice(section: PlanSection) -> None:
    """Raises ValueError for an option that would have no effect."""
    strategy, action = section.strategy, section.action
    if strategy in REMOVING and action != "remove":
        raise ValueError(f"strategy {strategy} chooses units to remove; set plan.action=remove")
    if strategy == "basis" and action != "tie":
        raise ValueError("strategy basis ignores action; remove plan.action")
    if action == "any" and strategy not in MEASURED:
        raise ValueError("action any needs measured losses to compare; set plan.strategy=loss")
    if strategy == "auto" and action != "tie":
        raise ValueError("strategy auto ignores action, it ties and removes; remove plan.action")
    if action == "remove" and strategy in ("released", "basis", "file", "none"):
        raise ValueError(f"strategy {strategy} ignores action; remove plan.action")
    if action == "remove" and _is_set(section, "share"):
        raise ValueError("action remove ignores share, a unit is removed whole; remove plan.share")
    ignored = []
    if strategy != "loss":
        ignored.append("search")
    if not section.measures:
        ignored.append("calibration_blocks")
    if strategy in (*MEASURED, *REMOVING):
        ignored.append("score")
    if strategy in ("auto", "basis"):
        ignored.append("share")
    if strategy != "auto":
        ignored.append("basis")
    if strategy == "basis":
        ignored.append("skip_layers")
    if not section.scores:
        ignored.append("fold_norm")
    for name in ignored:
        if _is_set(section, name):
            raise ValueError(f"strategy {strategy} ignores {name}; remove plan.{name}")
    if section.fold_norm and section.scores_text:
        raise ValueError(
            f"score {section.score} is measured on text, where the norm has its gain; remove "
            "plan.fold_norm"
        )
    budget = section.budget
    if strategy == "basis" and budget and (budget.parameters or budget.bytes) is None:
        raise ValueError(
            "strategy basis shares no heads and saves no cache; set plan.budget.parameters or "
            "plan.budget.bytes"
        )
    cache = budget is not None and budget.cache is not None
    if cache and action == "tie" and strategy != "auto":
        raise ValueError(
            "budget.cache: a tied unit still caches keys and values of its own; set "
            "plan.action=remove, or use spans or heads.kv_heads"
        )


def _is_set(section: PlanSection, name: str) -> bool:
    # A resolved recipe states the defaults too: they change nothing.
    return getattr(section, name) != type(section).model_fields[name].get_default()
