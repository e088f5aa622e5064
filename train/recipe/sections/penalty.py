"""The penalty: how paired units are pulled together while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from train.recipe.sections.base import (
    SEQUENCE,
    Count,
    Projections,
    Section,
    Weight,
)

KINDS = {
    "l2": "train.penalty.distances:L2",
    "mse": "train.penalty.distances:MSE",
    "kl": "train.penalty.distances:KL",
    "symmetric_kl": "train.penalty.distances:SymmetricKL",
    "js": "train.penalty.distances:JS",
    "cosine": "train.penalty.distances:Cosine",
}
"""Where the class of each kind of the penalty is: `module:class`, imported when it is used."""
if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(KINDS)]


class PenaltySection(Section):
    """The regularizer that pulls the two units of a tie together."""

    mode: Literal["coupled", "decoupled", "progressive"] = "coupled"
    """coupled: a loss (the paper's); decoupled: its proximal step after the optimizer's, in which
    units become equal; progressive: targets reach their sources in ramp_steps, and stay."""
    kind: Kind = "l2"
    """Distance of two units; l2, the unsquared Frobenius norm, is the paper's."""
    projections: Projections | None = None
    """Projections that are pulled (default: exactly those that will be shared)."""
    loss_weights: Annotated[tuple[Weight, Weight], SEQUENCE] = (0.5, 0.5)
    """Weights of the language-model loss and of the penalty (of its step, for decoupled)."""
    coefficient: Weight = 1.0
    """Further factor on the penalty, reached at the end of the ramp."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the coefficient rises from 0 over ramp_steps; for progressive, how targets move."""
    ramp_steps: Count = 0
    """Optimizer steps of the ramp; for progressive, those in which a target reaches its source."""

    def _loss(self) -> Iterator[str]:
        if sum(self.loss_weights) <= 0:
            yield "loss_weights are both 0; set at least one above 0"

    def _ramp(self) -> Iterator[str]:
        if self.mode == "progressive" and self.ramp_steps == 0:
            yield (
                "mode progressive takes the steps in which a target reaches its source, and how; "
                "set ramp_steps >= 1 and schedule linear or cosine"
            )
        elif (self.schedule == "constant") != (self.ramp_steps == 0):
            yield "a ramp takes both schedule (linear or cosine) and ramp_steps >= 1; set both"

    def _kind(self) -> Iterator[str]:
        if self.mode != "coupled" and self.kind != "l2":
            yield (
                f"mode {self.mode} moves units along their difference, by its length: kind "
                f"{self.kind} has no such step; remove kind, or set mode coupled"
            )

    def _weighing(self) -> Iterator[str]:
        if self.mode != "progressive":
            return
        for key in ("loss_weights", "coefficient"):
            # A resolved recipe states the defaults too: they change nothing.
            if getattr(self, key) != type(self).model_fields[key].get_default():
                yield f"mode progressive has no loss to weigh, so {key} has no effect; remove {key}"

    rules = (_loss, _ramp, _kind, _weighing)

    @property
    def weights(self) -> tuple[float, float]:
        """Factors on the language-model loss and on the penalty."""
        return (1.0, 0.0) if self.mode == "progressive" else self.loss_weights
