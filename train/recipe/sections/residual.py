"""The section of a recipe that gives tied units a low-rank residual of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from sa_models.materialize.low_rank_residual import residual_parameters
from sa_models.materialize.merge import GAUGED, MEASURED
from train.recipe.sections.common import Positive, Section

if TYPE_CHECKING:
    from sa_models.plan import SharingPlan
    from train.recipe.recipe import Recipe


class ResidualSection(Section):
    """A LoRA on every projection that has tied units, from when they are made one."""

    rank: Positive
    """Rank of each projection's residual, at most the size of a head."""
    init: Literal["svd", "zero"] = "svd"
    """svd: the best residual of the rank for what the ties lose; zero: as a LoRA begins."""
    whiten: bool = True
    """Lose least of the outputs on calibration text, rather than of the weights."""
    calibration_blocks: Positive = 8
    """Training blocks of that text, of each the first 512 tokens."""
    train: Literal["both", "residual"] = Field(default="both")
    """What healing trains: the residuals and train.trainable, or the residuals alone."""

    @model_validator(mode="after")
    def _inputs(self) -> Self:
        if self.init == "zero" and self._is_set("whiten"):
            raise ValueError("init zero ignores whiten; remove residual.whiten")
        if not self.measures and self._is_set("calibration_blocks"):
            raise ValueError(
                "calibration_blocks are those of a whitened svd; remove residual.calibration_blocks"
            )
        return self

    def _is_set(self, name: str) -> bool:
        # A resolved recipe states the defaults too: they change nothing.
        return getattr(self, name) != type(self).model_fields[name].get_default()

    def parameters(self, plan: SharingPlan, config: Any) -> int:
        """Of the residuals of a plan."""
        return residual_parameters(plan, config, self.rank)

    @property
    def measures(self) -> bool:
        """Whether calibration text is needed."""
        return self.init == "svd" and self.whiten


def check_residual(recipe: Recipe) -> None:
    """Raises ValueError for a section that has no effect, or that the recipe cannot follow."""
    section, plan = recipe.residual, recipe.plan
    if section is None:
        return
    if plan.strategy in ("none", "basis") or plan.action == "remove":
        raise ValueError("residual: nothing is tied, so nothing is lost to ties; remove residual")
    if plan.strategy == "auto":
        raise ValueError(
            "residual: strategy auto compares plans by what they store, without residuals; set "
            "plan.strategy=loss or cosine"
        )
    if plan.budget is not None and (plan.budget.parameters or plan.budget.bytes):
        raise ValueError(
            "plan.budget: what residuals take depends on the layers that are tied, which a budget "
            "of parameters or bytes does not know; set plan.budget.ratio or plan.budget.heads"
        )
    merge = recipe.materialize.merge
    if merge in GAUGED + MEASURED:
        raise ValueError(
            f"residual: materialize.merge {merge} writes heads in another gauge, in which what "
            "they lost has no meaning; set materialize.merge to copy or mean"
        )
    if recipe.materialize.reconstruct:
        raise ValueError(
            "residual: materialize.reconstruct makes up in o for what residuals bring back; keep "
            "one of the two"
        )
    if recipe.materialize.heal_steps == 0:
        if section.init == "zero":
            raise ValueError(
                "residual.init: zero adds nothing until it is trained; set materialize.heal_steps, "
                "or residual.init=svd"
            )
        if section.train != "both":
            raise ValueError("residual.train is about healing; set materialize.heal_steps")
