"""The section of a recipe that lets the student learn from the frozen, unshared model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from train.recipe.sections.base import PathName, Positive, Section, Weight


class DistillSection(Section):
    """Distillation from a frozen teacher, in every training of the run: post-training, its control
    and healing."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the divergence from the teacher; the cross-entropy has 1 - weight."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Both distributions are softened by it; the divergence counts times its square."""
    top_k: Positive | None = None
    """Compare the teacher's k likeliest tokens and all others as one; null: every token."""
    hidden_weight: Weight = 0.0
    """Weight of the relative squared error of the hidden states after each layer."""
    attention_weight: Weight = 0.0
    """Weight of the relative squared error of the outputs of the attention blocks."""
    teacher: PathName | None = None
    """Folder or hub name of another teacher, a Llama (default: the base model, unshared)."""
    precision: Literal["fp32", "bf16", "int8", "auto"] = "fp32"
    """The teacher's weights and computation; int8 needs a GPU and the extra [gpu]; auto: as for
    train.precision."""
    cache: bool = False
    """Compute the teacher's top_k once, before the training, and keep it in the run folder."""

    def _likeliest(self) -> Iterator[str]:
        if self.cache and self.top_k is None:
            yield "cache keeps the likeliest tokens only; set distill.top_k, say to 64"

    def _features(self) -> Iterator[str]:
        if self.cache and self.features:
            yield (
                "cache holds no hidden states and attention outputs; set distill.cache=false, or "
                "hidden_weight and attention_weight to 0"
            )

    rules = (_likeliest, _features)

    @property
    def features(self) -> bool:
        """Whether more than the teacher's distribution is compared."""
        return self.hidden_weight > 0 or self.attention_weight > 0
