"""The section of a recipe that says how tied units are made one, and healed."""

from __future__ import annotations

from collections.abc import Iterator

from sa_models.materialize.registry import MEASURED, Merge
from train.recipe.sections.base import (
    Count,
    Positive,
    Rate,
    Section,
)


class MaterializeSection(Section):
    """How tied units are made one."""

    merge: Merge = "copy"
    """copy: the source's weights; mean: the mean of the source and all its targets; aligned_mean:
    after writing targets in the source's gauge; absorb: copy, and a kept o adapts to the new v;
    weighted_mean, least_squares: as aligned_mean, weighed by Fisher information or fitted to all
    units' outputs on calibration text (RegMean)."""
    reconstruct: bool = False
    """Solve o of the changed layers and those above by least squares on calibration text, so that
    the heads that are left make up for what has changed."""
    calibration_blocks: Positive = 32
    """Training blocks for weighted_mean, least_squares, reconstruct and the first factors of a
    shared basis, spread evenly."""
    heal_steps: Count = 0
    """Optimizer steps of tied fine-tuning afterwards."""
    heal_learning_rate: Rate | None = None
    """Learning rate of these steps (default: train.learning_rate)."""

    def _heal(self) -> Iterator[str]:
        if self.heal_learning_rate is not None and self.heal_steps == 0:
            yield "heal_learning_rate without healing; set materialize.heal_steps"

    rules = (_heal,)

    @property
    def measures(self) -> bool:
        """Whether calibration text is needed, whatever the plan."""
        return self.merge in MEASURED or self.reconstruct

    @property
    def remaining_merge(self) -> Merge:
        """How weights that were materialized on text, where the recipe asks, are still merged."""
        return "copy" if self.reconstruct else self.merge
