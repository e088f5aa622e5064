"""The objective of a training: named losses of its tokens, whose weighted sum is the total."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from sa_models.calibration.token_losses import IGNORED
from train.training.distill_loss import feature_sum, token_sums
from train.training.teacher import Lesson, Taps, Teacher
from train.training.teacher_cache import TeacherCache, taught

if TYPE_CHECKING:
    from train.data.blocks import Blocks
    from train.distributed.engines.base import Engine
    from train.recipe.recipe import Recipe

Batch = dict[str, Tensor]


def token_losses(engine: Engine, batch: Batch) -> Tensor:
    """Sum of the micro-batch's token losses in nats, computed in fp32."""
    batch, labels = _on_device(engine, batch)
    logits = engine.model(**batch, use_cache=False).logits.float()
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _on_device(engine: Engine, batch: Batch) -> tuple[Batch, Tensor]:
    """The inputs, and the label of each position: the token after it."""
    batch = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in batch.items()}
    # Padding the labels instead of cutting the logits spares a copy of the logits.
    return batch, F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)


class Lessons:
    """Where a training's lessons come from: the teacher itself, or its answers on disk.

    Made before the student is, and by all ranks: a collective, as loading and asking the teacher
    may be.

    Attributes:
        blocks: to be trained on; with a cache they carry the answers.
    """

    def __init__(self, recipe: Recipe, engine: Engine, blocks: Blocks, steps: int) -> None:
        assert recipe.distill is not None
        self.blocks = blocks
        self._teacher: Teacher | None = None
        if recipe.distill.cache:
            cache = TeacherCache(recipe, engine, blocks)
            self.blocks = cache.fill(steps * recipe.train.batch_size)
        else:
            self._teacher = Teacher(recipe, engine)

    def __call__(self, batch: Batch) -> Lesson:
        """What the teacher says about a micro-batch on the device; cached answers leave it."""
        return Lesson(taught(batch), [], []) if self._teacher is None else self._teacher(batch)


class Objective:
    """The losses of a micro-batch by name, each a sum over its predicted tokens.

    Without lessons this is `lm_loss` alone, the cross-entropy. With them, and the recipe's
    `distill` section, also `distill_loss` (see `train.training.distill_loss`) and, where their
    weights are not 0, `hidden_loss` and `attention_loss`; in place of the cross-entropy L the total
    has

        (1 - weight) L + weight distill_loss + hidden_weight hidden_loss
            + attention_weight attention_loss.

    Attributes:
        weights: of each loss in the total, in the order of the losses.
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        recipe: Recipe,
        lm_weight: float = 1.0,
        lessons: Lessons | None = None,
    ) -> None:
        self.engine, self.lessons, self.section = engine, lessons, recipe.distill
        self.weights = {"lm_loss": lm_weight}
        if lessons is None:
            return
        assert self.section is not None
        hidden, attention = self.section.hidden_weight, self.section.attention_weight
        self.weights = {
            "lm_loss": lm_weight * (1 - self.section.weight),
            "distill_loss": lm_weight * self.section.weight,
            **({"hidden_loss": lm_weight * hidden} if hidden else {}),
            **({"attention_loss": lm_weight * attention} if attention else {}),
        }
        self._taps = Taps(model, hidden > 0, attention > 0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Each an fp32 scalar with a gradient; divide by the predicted tokens of all ranks."""
        if self.lessons is None:
            return {"lm_loss": token_losses(self.engine, batch)}
        assert self.section is not None
        batch, labels = _on_device(self.engine, batch)
        lesson = self.lessons(batch)
        with self._taps:
            logits = self.engine.model(**batch, use_cache=False).logits
        entropy, divergence = token_sums(
            logits, labels, lesson.distribution, self.section.temperature
        )
        losses = {"lm_loss": entropy, "distill_loss": divergence}
        hidden, attention = self._taps.take()
        predicted = labels != IGNORED
        if hidden:
            losses["hidden_loss"] = feature_sum(hidden, lesson.hidden, predicted)
        if attention:
            losses["attention_loss"] = feature_sum(attention, lesson.attention, predicted)
        return losses

    def total(self, losses: dict[str, Any]) -> Any:
        """Their weighted sum."""
        return sum(self.weights[name] * losses[name] for name in self.weights)
