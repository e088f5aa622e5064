"""The identity of a run: all of a recipe that decides its numbers."""

from __future__ import annotations

from typing import Any

from train.recipe.recipe import Recipe

# What may change between two segments of a run: it changes no number beyond rounding.
FREE_TRAIN = {
    "steps",  # the job says how many, whatever the recipe counts in
    "epochs",
    "learning_rate",  # likewise
    "micro_batch_size",
    "gradient_checkpointing",
    "compile",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "hang_timeout",
    "health_every",
    "keep_best",
}


def compared(theirs: Recipe, ours: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The identities of two recipes, for :func:`train.common.identity.refuse_other_run`.

    A recipe with `recovery` says train.steps and means the steps before and after sharing: where
    their sum differs, it is compared under the name that was typed.
    """
    both = run_identity(theirs), run_identity(ours)
    if not ours.recovers or theirs.steps == ours.steps:
        return both
    for recipe, identity in zip((theirs, ours), both, strict=True):
        identity["train"]["steps"] = recipe.steps
        del identity["materialize"]["heal_steps"]
    return both


def run_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's results; the rest of a recipe may change between two starts."""
    free = {"name", "output_dir", "resume", "wandb", "export", "evaluate"}
    value = recipe.model_dump(mode="json", exclude=free)
    value["train"] = {
        k: v
        for k, v in value["train"].items()
        if k in ("steps", "epochs", "learning_rate") or k not in FREE_TRAIN
    }
    value["data"].pop("processes")
    if recipe.steps == 0:  # these are about training
        for key in ("batch_size", "learning_rate"):
            del value["train"][key]
    return value
