"""The fields of a recipe, and what follows from them alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from train.recipe.recovery import Recovery
from train.recipe.sections.base import PathName, Section
from train.recipe.sections.distill import DistillSection
from train.recipe.sections.inputs import DataSection, ModelSection
from train.recipe.sections.lora import LoraSection
from train.recipe.sections.materialize import MaterializeSection
from train.recipe.sections.outputs import EvaluateSection, ExportSection
from train.recipe.sections.penalty import PenaltySection
from train.recipe.sections.plan import PlanSection
from train.recipe.sections.residual import ResidualSection
from train.recipe.sections.structure import HeadsSection, Spans
from train.recipe.sections.training import TrainSection
from train.recipe.sections.wandb import WandbSection

if TYPE_CHECKING:
    from sa_models.weights.structure import Leaders


class RecipeFields(Section):
    """What a recipe says; :class:`~train.recipe.recipe.Recipe` is one whose sections agree."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run: letters, digits, dot, dash and underscore."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of initialization and data order."""
    output_dir: PathName | None = None
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

    def accumulation(self, world_size: int) -> int:
        """Forward passes per optimizer step on each process; 1 where nothing trains.

        Raises:
            PostshareError: see :meth:`TrainSection.accumulation`.
        """
        return 1 if self.steps == 0 else self.train.accumulation(world_size)

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
            and not self.plan.removes
            and self.plan.strategy != "basis"
            and self.train.steps != 0
            and self.penalty.loss_weights[1] > 0
            and self.penalty.coefficient > 0
        )
