"""The typed recipe: what a run is.

A recipe is resolved as defaults <- YAML <- `a.b=c` from the command line. Unknown keys are errors
(`train.recipe.explain` names the nearest valid one), and so is an option that would have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from sa_models.atomic_files import write_text
from sa_models.errors import PostshareError
from train.recipe import yaml12
from train.recipe.explain import explain
from train.recipe.fields import RecipeFields
from train.recipe.load import override as apply
from train.recipe.load import read
from train.recipe.recovery import written_out
from train.recipe.rules import disagreements
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

    @model_validator(mode="before")
    @classmethod
    def _recovery_written_out(cls, data: Any) -> Any:
        return written_out(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if (problem := next(disagreements(self), None)) is not None:
            raise ValueError(problem)
        return self

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included."""
        return yaml12.dump(self.model_dump(mode="json"))

    def save(self, path: Path | str) -> None:
        """Write the resolved recipe to `path`, whole or not at all."""
        write_text(Path(path), self.to_yaml())


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or of a shipped name, with `a.b=c` overrides applied.

    Raises:
        PostshareError: no such recipe, not YAML, or the first thing in it that is wrong.
    """
    data = read(path_or_name)
    for override in overrides:
        apply(data, override)
    return validate(data, origin=str(path_or_name))


def validate(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """`data`, as YAML gives it, as a recipe.

    Raises:
        PostshareError: one line: the path of the first error, its value, and what is allowed.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise PostshareError(f"{origin}: {explain(error, Recipe)}") from None
