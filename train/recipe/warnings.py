"""Warnings about a recipe: what it may say and probably does not mean."""

from __future__ import annotations

from collections.abc import Iterable

from train.recipe.fields import RecipeFields
from train.recipe.sections.penalty import PenaltySection


def recipe_warnings(
    recipe: RecipeFields, shared: Iterable[str] | None = None, positions: int | None = None
) -> list[str]:
    """What is allowed and probably not meant, one line each: for run, dry run and doctor alike.

    Args:
        shared: projections that the plan ties, when the plan is known; plan.share otherwise
            (with strategies file and auto, only the plan itself knows).
        positions: `max_position_embeddings` of the model, when its config is known.
    """
    lines = _ramps(recipe)
    if positions is not None and recipe.data.sequence_length > positions:
        lines.append(
            f"data.sequence_length {recipe.data.sequence_length} exceeds the {positions} positions "
            "that the model was made for, which costs quality; lower it"
        )
    data = recipe.data
    seen = {(source.path, source.subset, source.split) for source in data.train}
    for source in data.validation or ():
        if (source.path, source.subset, source.split) in seen:
            lines.append(
                f"data.validation: {source.path} is training text too, so its perplexity says "
                "nothing of other text; set data.validation_fraction in its place"
            )
    plan, penalty = recipe.plan, recipe.penalty
    if plan.strategy == "none":
        return lines
    if plan.strategy == "released":
        lines.append(
            "plan.strategy released keeps the published chains: fewer units really change than "
            "plan.budget asks for (18.8 % of 30 % on Llama-2-7B); use cosine unless you compare"
        )
    if plan.removes:
        if recipe.train.steps != 0:
            lines.append(
                f"plan.action is {plan.action}: train.steps trains the model with all its units, "
                "which are removed afterwards; to train without them, set materialize.heal_steps"
            )
    elif plan.strategy == "basis":
        if recipe.train.steps != 0:
            lines.append(
                "plan.strategy is basis: train.steps trains the dense weights, which are "
                "factorized afterwards; to train the factors, set materialize.heal_steps"
            )
    elif recipe.penalized:
        lines += _unpulled(recipe, shared)
    elif recipe.train.steps == 0:
        # Without training, sharing unpulled units is what DirectShare means.
        if penalty != PenaltySection():
            lines.append("train.steps is 0: nothing is trained, so the penalty has no effect")
    else:
        lines.append(
            "the penalty is off (its loss weight or coefficient is 0) while train.steps is not 0: "
            "units are shared without having been pulled together"
        )
    return lines


def _ramps(recipe: RecipeFields) -> list[str]:
    """Ramps that are longer than the training."""
    train, lines = recipe.train, []
    ramps = train.warmup_steps + (train.decay_steps or 0)
    if train.steps and ramps > train.steps:
        lines.append(
            f"train.warmup_steps and train.decay_steps take {ramps} of {train.steps} steps: the "
            "learning rate never reaches its peak"
        )
    if train.steps and recipe.penalized and recipe.penalty.ramp_steps > train.steps:
        lines.append(
            f"penalty.ramp_steps takes {recipe.penalty.ramp_steps} of {train.steps} steps: the "
            "penalty never reaches its coefficient"
        )
    return lines


def _unpulled(recipe: RecipeFields, shared: Iterable[str] | None) -> list[str]:
    """Projections that are shared and not pulled, or pulled and not shared."""
    plan, penalty = recipe.plan, recipe.penalty
    if shared is None:
        if plan.strategy in ("file", "auto"):
            return []
        shared = plan.share
    # Without penalty.projections the penalty follows the plan, whatever it shares.
    if penalty.projections is None:
        return []
    ties = set(shared)
    lines = []
    missing = [p for p in "qkvo" if p in ties and p not in penalty.projections]
    if missing:
        lines.append(
            f"{', '.join(missing)} will be shared without having been pulled: penalty.projections "
            "leaves out what the plan shares, which costs quality; remove penalty.projections"
        )
    idle = [p for p in penalty.projections if p not in ties]
    if idle:
        lines.append(
            f"{', '.join(idle)} will be pulled and not shared: the penalty costs quality there "
            "and saves nothing; remove penalty.projections"
        )
    return lines
