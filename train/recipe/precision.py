"""The precision of a training: what `auto` becomes, and what computes in bf16."""

from __future__ import annotations

from typing import Any

from train.recipe.recipe import Recipe

_SECTIONS = ("train", "distill")
"""Sections that have a `precision`."""


def precisions(recipe: Recipe) -> dict[str, str]:
    """Each precision of a recipe by its key, `train.precision` first."""
    sections = {name: getattr(recipe, name) for name in _SECTIONS}
    return {f"{n}.precision": s.precision for n, s in sections.items() if s is not None}


def is_auto(recipe: Recipe) -> bool:
    """Whether the hardware still has to say what it computes in."""
    return "auto" in precisions(recipe).values()


def with_precision(recipe: Recipe, precision: str, key: str | None = None) -> Recipe:
    """The recipe with `precision` in the place of each `auto`, or of the one at `key`."""
    return _replaced(recipe, dict.fromkeys([key] if key else precisions(recipe), precision))


def with_precisions_of(recipe: Recipe, other: Recipe) -> Recipe:
    """The recipe with what `other` says in the place of each `auto`."""
    return _replaced(recipe, precisions(other))


def _replaced(recipe: Recipe, values: dict[str, str]) -> Recipe:
    changes: dict[str, Any] = {}
    for name in _SECTIONS:
        section, value = getattr(recipe, name), values.get(f"{name}.precision")
        if section is not None and section.precision == "auto" and value is not None:
            changes[name] = section.model_copy(update={"precision": value})
    return recipe.model_copy(update=changes)
