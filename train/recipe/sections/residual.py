"""The section of a recipe that gives tied units a low-rank residual of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sa_models.materialize.residual_shapes import residual_parameters
from train.recipe.sections.base import Positive, Section

if TYPE_CHECKING:
    from sa_models.plan import SharingPlan


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

    def _whitening(self) -> Iterator[str]:
        if self.init == "zero" and self.is_set("whiten"):
            yield "init zero ignores whiten; remove residual.whiten"

    def _text(self) -> Iterator[str]:
        if not self.measures and self.is_set("calibration_blocks"):
            yield (
                "calibration_blocks are those of a whitened svd; remove residual.calibration_blocks"
            )

    rules = (_whitening, _text)

    def parameters(self, plan: SharingPlan, config: Any) -> int:
        """Of the residuals of a plan."""
        return residual_parameters(plan, config, self.rank)

    @property
    def measures(self) -> bool:
        """Whether calibration text is needed."""
        return self.init == "svd" and self.whiten
