"""The section of a recipe that trains LoRA adapters instead of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from train.recipe.sections.base import Positive, Section, distinct

Shapes = Mapping[str, tuple[int, ...]]
"""{parameter name: shape}."""

NF4_BYTES = 0.5 + 1 / 64
"""Of an element: four bits, and an 8-bit scale for each 64; the scales of scales are nothing."""


class LoraSection(Section):
    """Adapters on the projections: they train, the weights stay, and take them up at the end."""

    rank: Positive
    """Rank of each adapter (PEFT's r)."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """What an adapter adds is alpha / rank x B A (PEFT's lora_alpha; default: twice the rank)."""
    targets: Annotated[
        tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...],
        Field(strict=False, min_length=1),
        AfterValidator(distinct),
    ] = ("q", "k", "v", "o")
    """Projections of every layer with an adapter (PEFT's target_modules)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of an adapter's inputs (PEFT's lora_dropout); the penalty knows none."""
    base: Literal["fp32", "bf16", "nf4"] = "fp32"
    """What the frozen weights are held in; nf4: 4 bits (QLoRA), needs a GPU and the extra [gpu]."""

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the parameter of this name has an adapter."""
        module, _, kind = name.rpartition(".")
        projection = module.rpartition(".")[2].removesuffix("_proj")
        return kind == "weight" and projection in self.targets

    def parameters(self, shapes: Shapes) -> int:
        """Of all adapters of a model with parameters of these names and shapes."""
        return self.rank * sum(sum(size) for name, size in shapes.items() if self.adapts(name))

    def model_bytes(self, shapes: Shapes, size: int) -> int:
        """Bytes of a model's weights on a device, without adapters.

        Args:
            size: of a number that the model computes with, 4 or 2; of fp32 weights autocast makes
                copies of 2.
        """
        total = sum(map(math.prod, shapes.values()))
        if self.base == "fp32":
            return (4 if size == 4 else 6) * total
        small = sum(math.prod(size) for name, size in shapes.items() if in_four_bits(name))
        return 2 * total if self.base == "bf16" else round(2 * (total - small) + NF4_BYTES * small)


def in_four_bits(name: str) -> bool:
    """Whether nf4 holds this parameter in 4 bits: the projections of the layers, not embeddings."""
    return name.endswith("_proj.weight")
