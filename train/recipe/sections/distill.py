"""The section of a recipe that lets the student learn from the frozen, unshared model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from train.recipe.sections.common import Name, Positive, Section, Weight

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe


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
    teacher: Name | None = None
    """Folder or hub name of another teacher, a Llama (default: the base model, unshared)."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """The teacher's weights and computation; int8 needs a GPU and the extra [gpu]."""
    cache: bool = False
    """Compute the teacher's top_k once, before the training, and keep it in the run folder."""

    @model_validator(mode="after")
    def _cache(self) -> Self:
        if self.cache and self.top_k is None:
            raise ValueError("cache keeps the likeliest tokens only; set distill.top_k, say to 64")
        if self.cache and self.features:
            raise ValueError(
                "cache holds no hidden states and attention outputs; set distill.cache=false, or "
                "hidden_weight and attention_weight to 0"
            )
        return self

    @property
    def features(self) -> bool:
        """Whether more than the teacher's distribution is compared."""
        return self.hidden_weight > 0 or self.attention_weight > 0


def check_distill(recipe: Recipe) -> None:
    """Raises ValueError for a section that has no effect, or that the recipe cannot follow."""
    section = recipe.distill
    if section is None:
        return
    if recipe.steps == 0:
        raise ValueError("distill: nothing is trained (train.steps is 0); remove distill")
    if recipe.model.config is not None and section.teacher is None:
        raise ValueError(
            "distill: the base is random weights, which teach nothing; set distill.teacher"
        )
    if recipe.model.attention == "flash_attention_2" and section.precision != "bf16":
        raise ValueError(
            "distill.precision: flash_attention_2 computes in bf16 only, the teacher too; set "
            "distill.precision=bf16, or model.attention=sdpa"
        )
