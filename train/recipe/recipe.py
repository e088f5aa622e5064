"""The typed recipe: what a run is.

A recipe is resolved as defaults <- YAML <- `a.b=c` from the command line. Unknown keys are errors
(`train.recipe.explain` names the nearest valid one), and so is an option that would have no effect;
`train.recipe.faults` finds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from sa_models.atomic_files import write_text
from sa_models.errors import PostshareError
from train.recipe import yaml12
from train.recipe.faults import FaultyRecipeError, faults
from train.recipe.fields import RecipeFields
from train.recipe.load import override, read, text_of
from train.recipe.recovery import resolved
from train.recipe.rules import RULES
from train.recipe.sections.distill import DistillSection
from train.recipe.sections.inputs import DataSection, DataSource, ModelSection
from train.recipe.sections.lora import LoraSection
from train.recipe.sections.materialize import MaterializeSection
from train.recipe.sections.outputs import EvaluateSection, ExportSection
from train.recipe.sections.penalty import PenaltySection
from train.recipe.sections.plan import Budget, PlanSection
from train.recipe.sections.residual import ResidualSection
from train.recipe.sections.structure import HeadsSection, SpansSection
from train.recipe.sections.training import TrainSection
from train.recipe.sections.wandb import WandbSection

__all__ = [
    "Budget",
    "DataSection",
    "DataSource",
    "DistillSection",
    "EvaluateSection",
    "ExportSection",
    "HeadsSection",
    "LoraSection",
    "MaterializeSection",
    "ModelSection",
    "PenaltySection",
    "PlanSection",
    "Recipe",
    "ResidualSection",
    "SpansSection",
    "TrainSection",
    "WandbSection",
    "load_recipe",
    "validate",
]


class Recipe(RecipeFields):
    """One run of postshare, from a base model to its exports."""

    rules = RULES

    @cached_property
    def recovers(self) -> bool:
        """Whether it was written with `recovery`, of which train.steps is the number of all steps;
        a resolved recipe, as a run folder holds it, was not."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, data: Any) -> Any:
        return resolved(data) if isinstance(data, dict) else data

    @cached_property
    def written(self) -> str:
        """The recipe as it was written: its file with what was typed beside it, or what was set."""
        return yaml12.dump(self.model_dump(mode="json", exclude_unset=True))

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included."""
        return yaml12.dump(self.model_dump(mode="json"))

    def save(self, path: Path | str) -> None:
        """Write the resolved recipe to `path`, whole or not at all."""
        write_text(Path(path), self.to_yaml())


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or of a shipped name, with `a.b=c` overrides applied.

    Raises:
        PostshareError: no such recipe, or not YAML; or all that is wrong in it and in the
            overrides, as :class:`~train.recipe.faults.FaultyRecipeError` says it.
    """
    data = read(path_or_name)
    refused: dict[str, str] = {}
    for text in overrides:
        try:
            override(data, text)
        except PostshareError as error:
            refused[text] = str(error)
    if not refused:
        recipe = validate(data, origin=str(path_or_name))
        typed = ["# Typed with it:\n", *(f"#   {text}\n" for text in overrides)]
        recipe.__dict__["written"] = text_of(path_or_name) + "".join(typed if overrides else ())
        return recipe
    paths = [tuple(text.partition("=")[0].strip().split(".")) for text in refused]
    lines = [*refused.values(), *faults(data, unknown=paths)]
    if len(lines) == 1:  # it is on the command line, not in the recipe
        raise PostshareError(lines[0])
    raise FaultyRecipeError(str(path_or_name), lines)


def validate(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """`data`, as YAML gives it, as a recipe.

    Raises:
        FaultyRecipeError: all that is wrong: the path of each, its value, and what is allowed.
    """
    try:
        recipe = Recipe.model_validate(data)
        recipe.__dict__["recovers"] = data.get("recovery") is not None
        return recipe
    except ValidationError:
        raise FaultyRecipeError(origin, faults(data)) from None
