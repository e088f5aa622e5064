"""Training: batches, the optimizer, its schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from sa_models.errors import PostshareError
from train.recipe.sections.base import (
    SEQUENCE,
    Beta,
    Count,
    Name,
    Positive,
    Rate,
    Section,
    Weight,
)

Checkpointing = bool | Literal["selective"] | Annotated[int, Field(ge=2)]
"""Of which layers, and what."""


class TrainSection(Section):
    """The post-training itself. Counts are of optimizer steps and of sequences.

    Where nothing trains (steps 0, no healing), batch_size, micro_batch_size and learning_rate need
    not be set.
    """

    steps: Count | None = None
    """Optimizer steps; 0 shares without training (DirectShare)."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training blocks, instead of steps."""
    batch_size: Positive
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: Positive
    """Sequences per forward, per process."""
    learning_rate: Rate
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd = warm-up, stable, decay."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate, relative to the peak."""
    decay_steps: Positive | None = None
    """Steps of the final decay, for wsd."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay on the parameters that weight_decay_exclude does not name."""
    weight_decay_exclude: Annotated[tuple[Name, ...], SEQUENCE] = (
        "*norm*",
        "*bias",
        "*embed_tokens*",
    )
    """Shell patterns of the parameter names without weight decay; []: decay all of them."""
    betas: Annotated[tuple[Beta, Beta], SEQUENCE] = (0.9, 0.95)
    """Adam's betas."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Adam's epsilon."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm to clip at; null: no clipping."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Precision of forward and backward; master weights stay fp32. auto: bf16 where every process
    has the instructions (GPUs since Ampere; CPUs with avx512_bf16, amx_bf16), else fp32."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit needs a GPU and the extra [gpu]."""
    kernels: Literal["torch", "liger"] = "torch"
    """liger: fused RMSNorm, SwiGLU, rotary embedding and cross-entropy; needs an NVIDIA GPU and the
    extra [gpu]."""
    trainable: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] = ("*",)
    """Shell patterns of the parameter names that train, such as *.self_attn.*"""
    gradient_checkpointing: Checkpointing = False
    """Compute activations again in the backward pass: true those of every layer, a number N those
    of every Nth, selective all but the matrix products and attention of every layer."""
    compile: bool = False
    """Compile the layers, one by one, before the first step (torch.compile): steps are faster, the
    start takes seconds to minutes more. Needs a C++ compiler, on a GPU Triton."""
    evaluate_every: Count = 0
    """Steps between evaluations; 0: only at the end."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0: only when stopped."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep."""
    hang_timeout: Annotated[float, Field(ge=1)] | None = 600.0
    """Seconds that a phase of a step (reading data, a micro-batch, a checkpoint, a validation
    block) may last before the training ends and names the late rank; the first step may take
    three times as long; null: wait as long as the process group does."""
    health_every: Count = 10
    """Steps between comparisons of the ranks: time, data wait, memory, loss; 0: never."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss; checkpoint_every must then be a
    multiple of evaluate_every."""

    def _length(self) -> Iterator[str]:
        if (self.steps, self.epochs).count(None) != 1:
            yield "takes exactly one of steps and epochs; set one, the other null"

    def _micro_batches(self) -> Iterator[str]:
        if self.batch_size % self.micro_batch_size:
            yield self._indivisible(1)

    def _decay(self) -> Iterator[str]:
        if self.decay_steps is not None and self.schedule != "wsd":
            yield f"schedule {self.schedule} ignores decay_steps; set schedule wsd"

    def _best(self) -> Iterator[str]:
        every = self.evaluate_every, self.checkpoint_every
        if self.keep_best and (0 in every or every[1] % every[0]):
            yield (
                f"keep_best knows the loss of evaluated checkpoints only, and checkpoint_every "
                f"{every[1]} is no multiple of evaluate_every {every[0]}; set both"
            )

    rules = (_length, _micro_batches, _decay, _best)

    def accumulation(self, world_size: int) -> int:
        """Forward passes per optimizer step on each of `world_size` processes.

        Raises:
            PostshareError: batch_size is no multiple of micro_batch_size * world_size.
        """
        if self.batch_size % (self.micro_batch_size * world_size):
            raise PostshareError(f"train: {self._indivisible(world_size)}")
        return self.batch_size // (self.micro_batch_size * world_size)

    def _indivisible(self, world_size: int) -> str:
        chunk = self.micro_batch_size * world_size
        nearest = max(chunk, round(self.batch_size / chunk) * chunk)
        processes = f" x {world_size} processes" if world_size > 1 else ""
        return (
            f"batch_size {self.batch_size} is no multiple of micro_batch_size "
            f"{self.micro_batch_size}{processes}; the nearest is train.batch_size={nearest}"
        )


def untrained(section: dict[str, Any]) -> dict[str, Any]:
    """The section of a recipe in which nothing trains: it need not say how.

    Args:
        section: as YAML gives it; its own values stay.
    """
    micro = section.get("micro_batch_size")
    batch = micro if type(micro) is int and micro > 0 else 1  # else the recipe's own check says so
    return {"batch_size": batch, "micro_batch_size": 1, "learning_rate": 5e-5, **section}
