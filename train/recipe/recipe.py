"""The typed recipe: what a run is.

A recipe is resolved as defaults <- YAML <- `a.b=c` from the command line. Unknown keys are errors
(`train.recipe.explain` names the nearest valid one), and so is an option that would have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sa_models.errors import PostshareError
from train.recipe.penalty_modes import disagreement
from train.recipe.recovery import Recovery, written_out
from train.recipe.sections.common import (
    DataSection,
    DataSource,
    EvaluateSection,
    ExportSection,
    MaterializeSection,
    ModelSection,
    Name,
    PenaltySection,
    Section,
    TrainSection,
)
from train.recipe.sections.distill import DistillSection, check_distill
from train.recipe.sections.lora import LoraSection, check_lora
from train.recipe.sections.plan import Budget, PlanSection
from train.recipe.sections.residual import ResidualSection, check_residual
from train.recipe.sections.structure import HeadsSection, Spans, SpansSection
from train.recipe.sections.wandb import WandbSection

if TYPE_CHECKING:
    from sa_models.weights.structure import Leaders

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


class Recipe(Section):
    """One run of postshare, from a base model to its exports."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run: letters, digits, dot, dash and underscore."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of initialization and data order."""
    output_dir: Name | None = None
    """Run folder (default: runs/<name>)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest complete checkpoint in the run folder."""
    model: ModelSection
    data: DataSection
    plan: PlanSection = PlanSection(strategy="none")
    spans: Spans | None = None
    """Layers that reuse what another layer has computed: a list of spans, or how to find them."""
    heads: HeadsSection = HeadsSection()
    penalty: PenaltySection = PenaltySection()
    recovery: Recovery | None = None
    """How quality comes back, in short: default (reconstruct, heal, distill), paper (penalty), or a
    list of steps. The resolved recipe has the sections it stands for instead."""
    train: TrainSection
    lora: LoraSection | None = None
    """Adapters that train instead of the weights, for one small GPU; merged when training ends."""
    distill: DistillSection | None = None
    """Learning from a frozen teacher, the unshared model, in every training of the run."""
    materialize: MaterializeSection = MaterializeSection()
    residual: ResidualSection | None = None
    """Low-rank corrections that tied units keep for themselves, exported as a PEFT adapter."""
    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()
    wandb: WandbSection = WandbSection()

    @model_validator(mode="before")
    @classmethod
    def _recovery_written_out(cls, data: Any) -> Any:
        return written_out(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if "plan" not in self.model_fields_set and not self.plans:
            raise ValueError(
                "nothing is shared; set plan, spans or heads (to train without sharing: "
                "plan.strategy=none)"
            )
        if self.plan.strategy == "file" and self.changes_structure:
            raise ValueError(
                "plan: the plan file says which spans and KV heads there are; remove spans and "
                "heads, or write them into the file"
            )
        compact_only = self.export.formats == ("compact",)
        if compact_only and self.plan.strategy == "none" and self.spans is None:
            raise ValueError(
                "export: without ties and spans nothing is stored once instead of often; set "
                "export.formats=[dense]"
            )
        if self.plan.strategy == "none":
            if self.penalty != PenaltySection():
                raise ValueError("penalty: plan.strategy is none, nothing to pull; remove penalty")
            self._nothing_to_materialize()
        if self.plan.action == "remove":
            self._nothing_is_tied("plan.action is remove")
        if self.plan.strategy == "basis":
            self._only_factors()
        self._text_is_read()
        if (problem := disagreement(self)) is not None:
            raise ValueError(problem)
        if self.data.streaming and self.train.steps is None:
            raise ValueError("train.epochs: a stream has no known length; set train.steps instead")
        if self.data.document_mask and self.model.attention == "flash_attention_2":
            self._one_row_for_flash_attention()
        check_distill(self)
        check_residual(self)
        check_lora(self)
        return self

    def _nothing_to_materialize(self) -> None:
        if not self.changes_structure and self.materialize != MaterializeSection():
            raise ValueError(
                "materialize: plan.strategy is none, nothing is tied; remove materialize"
            )
        if self.materialize.merge != "copy":
            raise ValueError(
                "materialize.merge: plan.strategy is none, nothing is merged; remove it"
            )
        if self.materialize.reconstruct and self.train.steps != 0:
            raise ValueError(
                "materialize.reconstruct: spans and KV heads are there before train.steps, nothing "
                "changes after it; set train.steps=0 and materialize.heal_steps"
            )

    def _nothing_is_tied(self, why: str) -> None:
        if self.penalty != PenaltySection():
            raise ValueError(f"penalty: {why}, nothing to pull; remove penalty")
        if self.materialize.merge != "copy":
            raise ValueError(f"materialize.merge: {why}, nothing is merged; remove it")

    def _only_factors(self) -> None:
        self._nothing_is_tied("plan.strategy is basis")
        if self.changes_structure:
            raise ValueError(
                "plan.strategy basis goes with no spans and no other KV heads yet; remove spans "
                "and heads"
            )
        if self.materialize.reconstruct:
            raise ValueError(
                "materialize.reconstruct: plan.strategy is basis, whose factors are fitted to the "
                "text themselves; remove it"
            )

    def _text_is_read(self) -> None:
        section = self.materialize
        # A resolved recipe states the defaults too: they change nothing.
        default = type(section).model_fields["calibration_blocks"].get_default()
        if section.calibration_blocks != default and not self.may_read_text:
            raise ValueError(
                f"materialize: merge {section.merge} reads no text; remove calibration_blocks, set "
                "reconstruct, or set merge to weighted_mean or least_squares"
            )

    def _one_row_for_flash_attention(self) -> None:
        # transformers passes it no mask; it finds the borders in the positions, of one row only.
        for key, rows in (
            ("train.micro_batch_size", self.train.micro_batch_size),
            ("evaluate.batch_size", self.evaluate.batch_size),
        ):
            if rows > 1:
                raise ValueError(
                    f"{key}: flash_attention_2 sees the borders of documents only in a batch of "
                    f"one; set {key}=1, or model.attention=sdpa or flex_attention"
                )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir or f"runs/{self.name}")

    @property
    def leaders(self) -> Leaders:
        """How the leader of a kv span begins."""
        return "mean" if self.spans is None else self.spans.leaders

    @property
    def changes_structure(self) -> bool:
        """Whether the recipe itself asks for spans or for other KV heads."""
        return self.spans is not None or self.heads.kv_heads is not None

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the model, healing included; None where only the data tells (epochs).

        *continued* takes as many.
        """
        steps = self.train.steps
        return None if steps is None else steps + self.materialize.heal_steps

    @property
    def plans(self) -> bool:
        """Whether there is a sharing plan: ties, removed units, spans, KV heads or a basis."""
        return self.plan.strategy != "none" or self.changes_structure

    @property
    def may_read_text(self) -> bool:
        """Whether calibration text may be read to materialize: a plan file may have a basis."""
        return self.materialize.measures or self.plan.strategy in ("basis", "file")

    @property
    def penalized(self) -> bool:
        """Whether post-training pulls units together at all."""
        return (
            self.plan.strategy != "none"
            and self.plan.action != "remove"
            and self.plan.strategy != "basis"
            and self.train.steps != 0
            and self.penalty.loss_weights[1] > 0
            and self.penalty.coefficient > 0
        )

    def warnings(self, shared: Iterable[str] | None = None) -> list[str]:
        """What is allowed and probably not meant, one line each.

        Args:
            shared: projections that the plan ties, when the plan is known; plan.share otherwise
                (with strategies file and auto, only the plan itself knows).
        """
        from train.recipe.warnings import warnings

        return warnings(self, shared)

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included."""
        from train.recipe import yaml12

        return yaml12.dump(self.model_dump(mode="json"))

    def save(self, path: Path | str) -> None:
        """Write the resolved recipe to `path`, whole or not at all."""
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        beside.write_text(self.to_yaml(), encoding="utf-8")
        os.replace(beside, target)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file or of a shipped name, with `a.b=c` overrides applied.

    Raises:
        PostshareError: no such recipe, not YAML, or the first thing in it that is wrong.
    """
    from train.recipe import load

    data = load.read(path_or_name)
    for override in overrides:
        load.override(data, override)
    return validate(data, origin=str(path_or_name))


def validate(data: dict[str, Any], origin: str = "recipe") -> Recipe:
    """`data`, as YAML gives it, as a recipe.

    Raises:
        PostshareError: one line: the path of the first error, its value, and what is allowed.
    """
    from train.recipe.explain import explain

    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise PostshareError(f"{origin}: {explain(error, Recipe)}") from None
