"""The sections of a recipe: every field with its range, every contradiction an error."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from sa_models.errors import PostshareError
from sa_models.materialize.merge import MEASURED, Merge
from train.recipe.penalty_modes import idle_option

Projection = Literal["q", "k", "v", "o"]
_ORDER: tuple[Projection, ...] = ("q", "k", "v", "o")
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values. Raises ValueError when one of them is there twice."""
    if len(set(values)) != len(values):
        raise ValueError("names the same entry twice; list each once")
    return values


def _in_order(values: tuple[Projection, ...]) -> tuple[Projection, ...]:
    return tuple(p for p in _ORDER if p in distinct(values))


def as_sources(value: Any) -> Any:
    """A bare path or a bare mapping as the list of sources that it abbreviates."""
    if isinstance(value, str | dict | BaseModel):
        value = [value]
    if isinstance(value, list | tuple):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def shard_bytes(text: str) -> int:
    """Bytes of a size such as `2GB`, `500MB` or `1.5GiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size; write for example 500MB or 2GB")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def _size(text: str) -> str:
    shard_bytes(text)
    return text


# Strict everywhere, except that a YAML sequence may fill a tuple.
_Sequence = Field(strict=False)
Projections = Annotated[
    tuple[Projection, ...], Field(strict=False, min_length=1), AfterValidator(_in_order)
]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Rate = Annotated[float, Field(gt=0, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """What all parts of a recipe share: no unknown key, no coercion, no change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSection(Section):
    """The Llama to post-train."""

    path: Name
    """Folder or hub name of a Llama-architecture model; demo-base is the one that is shipped."""
    revision: Name | None = None
    """Hub revision (branch, tag or commit)."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation of transformers."""
    config: dict[str, Any] | None = None
    """LlamaConfig fields: start from random weights of this shape instead of a checkpoint."""
    tokenizer: Name | None = None
    """Folder or hub name of the tokenizer (default: model.path)."""


class DataSource(Section):
    """One text source of a mixture."""

    path: Name
    """Hub name, local .jsonl, .json, .parquet, .arrow, .txt or folder, or stdlib (the demo's)."""
    subset: Name | None = None
    """Configuration of a hub dataset, such as 20231101.en."""
    split: Name = "train"
    """Split to read."""
    text: Name = "text"
    """Column that holds the text (format text only)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of this source in the blocks of the mixture, relative to the other weights."""


Sources = Annotated[
    tuple[DataSource, ...],
    Field(strict=False, min_length=1),
    BeforeValidator(as_sources, json_schema_input_type=str | DataSource | list[str | DataSource]),
]


class DataSection(Section):
    """Text for post-training and for validation."""

    train: Sources
    """Training text: a path, one source, or a list of sources."""
    validation: Sources | None = None
    """Held-out text; when absent, validation_fraction of the training documents is held out."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training documents held out; needed when validation is absent."""
    sequence_length: Annotated[int, Field(ge=2)]
    """Tokens in a packed block."""
    format: Literal["text", "alpaca", "chat"] = "text"
    """alpaca: records with instruction, output and perhaps input, in Alpaca's prompt; chat: records
    with messages, in the tokenizer's chat template. Of both only the response is predicted."""
    document_mask: bool = False
    """Restart positions and mask attention at document borders within a block; always so for the
    formats alpaca and chat."""
    bos: bool = True
    """Start every document with the tokenizer's BOS token; for chat the template decides."""
    eos: bool = True
    """End every document with the tokenizer's EOS token; for chat the template decides."""
    streaming: bool = False
    """Read the training text as a stream, only as far as needed; requires train.steps."""
    processes: Positive = 1
    """Processes that tokenize."""

    @model_validator(mode="after")
    def _validation_text(self) -> Self:
        if self.validation is None and self.validation_fraction == 0:
            raise ValueError("no held-out text; set data.validation or data.validation_fraction")
        if self.validation is not None and self.validation_fraction > 0:
            raise ValueError(
                "validation and validation_fraction exclude each other; keep one of them"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _records_are_masked(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("format") in ("alpaca", "chat"):
            return {"document_mask": True, **value}
        return value

    @model_validator(mode="after")
    def _records(self) -> Self:
        if self.format == "text":
            return self
        if not self.document_mask:
            raise ValueError(
                f"format {self.format} never lets records see each other; remove document_mask"
            )
        if self.streaming:
            raise ValueError(f"format {self.format} is read whole; set data.streaming=false")
        if self.format == "chat" and not (self.bos and self.eos):
            raise ValueError("format chat takes BOS and EOS from the template; remove bos and eos")
        for source in (*self.train, *(self.validation or ())):
            if source.text != "text":
                fields = "instruction, input and output" if self.format == "alpaca" else "messages"
                raise ValueError(f"format {self.format} reads {fields}; remove text: {source.text}")
        return self


class PenaltySection(Section):
    """The regularizer that pulls the two units of a tie together."""

    mode: Literal["coupled", "decoupled", "progressive"] = "coupled"
    """coupled: a loss (the paper's); decoupled: its proximal step after the optimizer's, in which
    units become equal; progressive: targets reach their sources in ramp_steps, and stay."""
    kind: Literal["l2", "mse", "kl", "symmetric_kl", "js", "cosine"] = "l2"
    """Distance of two units; l2, the unsquared Frobenius norm, is the paper's."""
    projections: Projections | None = None
    """Projections that are pulled (default: exactly those that will be shared)."""
    loss_weights: Annotated[tuple[Weight, Weight], _Sequence] = (0.5, 0.5)
    """Weights of the language-model loss and of the penalty (of its step, for decoupled)."""
    coefficient: Weight = 1.0
    """Further factor on the penalty, reached at the end of the ramp."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the coefficient rises from 0 over ramp_steps; for progressive, how targets move."""
    ramp_steps: Count = 0
    """Optimizer steps of the ramp; for progressive, those in which a target reaches its source."""

    @model_validator(mode="after")
    def _ramp(self) -> Self:
        if sum(self.loss_weights) <= 0:
            raise ValueError("loss_weights are both 0; set at least one above 0")
        if (self.schedule == "constant") != (self.ramp_steps == 0):
            raise ValueError(
                "a ramp takes both schedule (linear or cosine) and ramp_steps >= 1; set both"
            )
        if (problem := idle_option(self)) is not None:
            raise ValueError(problem)
        return self

    @property
    def weights(self) -> tuple[float, float]:
        """Factors on the language-model loss and on the penalty."""
        return (1.0, 0.0) if self.mode == "progressive" else self.loss_weights


class TrainSection(Section):
    """The post-training itself. Counts are of optimizer steps and of sequences."""

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
    weight_decay_exclude: Annotated[tuple[Name, ...], _Sequence] = (
        "*norm*",
        "*bias",
        "*embed_tokens*",
    )
    """Shell patterns of the parameter names without weight decay; []: decay all of them."""
    betas: Annotated[tuple[Beta, Beta], _Sequence] = (0.9, 0.95)
    """Adam's betas."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-8
    """Adam's epsilon."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm to clip at; null: no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward and backward; master weights stay fp32."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit needs a GPU and the extra [gpu]."""
    trainable: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] = ("*",)
    """Shell patterns of the parameter names that train, such as *.self_attn.*"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
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

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("takes exactly one of steps and epochs; set one, the other null")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(self._indivisible(1))
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"schedule {self.schedule} ignores decay_steps; set schedule wsd")
        every = self.evaluate_every, self.checkpoint_every
        if self.keep_best and (0 in every or every[1] % every[0]):
            raise ValueError(
                f"keep_best knows the loss of evaluated checkpoints only, and checkpoint_every "
                f"{every[1]} is no multiple of evaluate_every {every[0]}; set both"
            )
        return self

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

    @model_validator(mode="after")
    def _heal(self) -> Self:
        if self.heal_learning_rate is not None and self.heal_steps == 0:
            raise ValueError("heal_learning_rate without healing; set materialize.heal_steps")
        return self

    @property
    def measures(self) -> bool:
        """Whether calibration text is needed, whatever the plan."""
        return self.merge in MEASURED or self.reconstruct

    @property
    def remaining_merge(self) -> Merge:
        """How weights that were materialized on text, where the recipe asks, are still merged."""
        return "copy" if self.reconstruct else self.merge


class ExportSection(Section):
    """The folders that are shipped."""

    formats: Annotated[
        tuple[Literal["compact", "dense"], ...],
        Field(strict=False, min_length=1),
        AfterValidator(distinct),
    ] = ("compact", "dense")
    """compact: each shared unit stored once; dense: a stock LlamaForCausalLM."""
    dtype: Literal["float32", "bfloat16", "float16", "base"] = "base"
    """Data type of the exported weights; base: that of the base model."""
    shard_size: Annotated[str, AfterValidator(_size)] = "2GB"
    """Largest safetensors file, such as 500MB or 2GB."""

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return shard_bytes(self.shard_size)


class EvaluateSection(Section):
    """Perplexity on the held-out text."""

    blocks: Positive | None = None
    """Validation blocks to use (default: all)."""
    batch_size: Positive = 8
    """Blocks per forward."""
    continued: bool = True
    """Also train the control: the same training without penalty and sharing."""
