"""The objective of a training: named losses of its tokens, whose weighted sum is the total."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from sa_models.calibration.logit_chunks import in_place_of
from sa_models.calibration.token_losses import IGNORED
from train.models import liger
from train.models.compiled_layers import compile_layers
from train.training.chunked_loss import token_sums
from train.training.distill_loss import feature_sum
from train.training.teacher import Lesson, Taps, Teacher
from train.training.teacher_cache import TeacherCache, taught

if TYPE_CHECKING:
    from train.data.blocks import Blocks
    from train.distributed.engines.base import Engine
    from train.recipe.recipe import Recipe

Batch = dict[str, Tensor]


def token_losses(
    engine: Engine, model: Any, batch: Batch, sums: Callable[..., Tensor] = token_sums
) -> Tensor:
    """Sum of the micro-batch's token losses in nats, computed in fp32.

    Args:
        model: the Llama that the engine has prepared.
        sums: of hidden states, the weight of lm_head and labels; that of the losses first.
    """
    batch, labels = _on_device(engine, batch)
    return _token_sums(engine, model, batch, labels, sums=sums)[0]


def _on_device(engine: Engine, batch: Batch) -> tuple[Batch, Tensor]:
    """The inputs, and the label of each position, the token after it, where they were read."""
    # Padding the labels instead of cutting the hidden states spares a copy of these.
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return {n: t.to(engine.device, non_blocking=True) for n, t in inputs.items()}, labels


def _token_sums(
    engine: Engine,
    model: Any,
    batch: Batch,
    labels: Tensor,
    *teacher: Any,
    sums: Callable[..., Tensor] = token_sums,
) -> Tensor:
    """:func:`train.training.chunked_loss.token_sums` of a forward through the engine."""

    def losses(hidden: Tensor) -> Tensor:
        return sums(hidden, model.lm_head.weight, labels, *teacher)

    with in_place_of(model.lm_head, losses):
        return engine.model(**batch, use_cache=False).logits


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
            # bitsandbytes' products cannot be compiled.
            if recipe.train.compile and recipe.distill.precision != "int8":
                compile_layers(self._teacher.model, evaluated=True)

    def __call__(self, batch: Batch) -> AbstractContextManager[Lesson]:
        """What the teacher says about a micro-batch on the device; cached answers leave it."""
        if self._teacher is None:
            return nullcontext(Lesson(taught(batch), [], []))
        return self._teacher(batch)


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
        self.engine, self.model, self.lessons = engine, model, lessons
        self.section = recipe.distill
        # Liger has no divergence from a teacher: with one the losses are by chunks, as without it.
        self._sums = liger.token_sums if recipe.train.kernels == "liger" else token_sums
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

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, which has a gradient, and each loss without one; fp32 scalars.

        Divide them by the predicted tokens of all ranks.
        """
        if self.lessons is None:
            loss = token_losses(self.engine, self.model, batch, self._sums)
            return self.weights["lm_loss"] * loss, {"lm_loss": loss.detach()}
        assert self.section is not None
        batch, labels = _on_device(self.engine, batch)
        weights = self.weights["lm_loss"], self.weights["distill_loss"]
        with self.lessons(batch) as lesson, self._taps:
            teaching = lesson.distribution, self.section.temperature, weights
            total, entropy, divergence = _token_sums(
                self.engine, self.model, batch, labels, *teaching
            )
        losses = {"lm_loss": entropy, "distill_loss": divergence}
        hidden, attention = self._taps.take()
        predicted = (labels != IGNORED).to(self.engine.device, non_blocking=True)
        if hidden:
            losses["hidden_loss"] = feature_sum(hidden, lesson.hidden, predicted)
            total = total + self.weights["hidden_loss"] * losses["hidden_loss"]
        if attention:
            losses["attention_loss"] = feature_sum(attention, lesson.attention, predicted)
            total = total + self.weights["attention_loss"] * losses["attention_loss"]
        return total, {name: loss.detach() for name, loss in losses.items()}

    def total(self, losses: dict[str, float]) -> float:
        """The weighted sum of losses."""
        return sum(self.weights[name] * losses[name] for name in self.weights)
