"""What the options of the penalty mean in each of its modes, and which would have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe
    from train.recipe.sections.common import PenaltySection


def idle_option(section: PenaltySection) -> str | None:
    """What is wrong with the options of a mode that edits the weights; None: nothing."""
    if section.mode == "coupled":
        return None
    if section.kind != "l2":
        return (
            f"mode {section.mode} moves units along their difference, by its length: kind "
            f"{section.kind} has no such step; remove kind, or set mode coupled"
        )
    if section.mode == "decoupled":
        return None
    if section.ramp_steps == 0:
        return (
            "mode progressive takes the steps in which a target reaches its source, and how; set "
            "ramp_steps >= 1 and schedule linear or cosine"
        )
    defaults = type(section)()
    for key in ("loss_weights", "coefficient"):
        if getattr(section, key) != getattr(defaults, key):
            return f"mode progressive has no loss to weigh, so {key} has no effect; remove {key}"
    return None


def disagreement(recipe: Recipe) -> str | None:
    """Where the penalty's mode and other sections contradict one another; None: nowhere."""
    section, steps = recipe.penalty, recipe.train.steps
    if section.mode != "coupled" and recipe.plan.strategy == "released":
        return (
            f"penalty: mode {section.mode} makes units equal, which the chains of plan.strategy "
            "released undo; set plan.strategy=cosine, or penalty.mode=coupled"
        )
    return unfinished(section, steps) if steps else None


def unfinished(section: PenaltySection, steps: int) -> str | None:
    """Why a training of `steps` steps would not see the end of the replacement; None: it does."""
    if section.mode != "progressive" or section.ramp_steps <= steps:
        return None
    return (
        f"penalty: mode progressive takes ramp_steps {section.ramp_steps} of {steps} steps, so no "
        f"target reaches its source; set penalty.ramp_steps={steps} or less"
    )
