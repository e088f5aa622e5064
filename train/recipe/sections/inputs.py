"""The sections of a recipe for what a run starts from: the base model, and text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from train.recipe.sections.base import (
    Name,
    PathName,
    Positive,
    Section,
)


class ModelSection(Section):
    """The Llama to post-train."""

    path: PathName
    """Folder, .gguf file or hub name of a Llama-architecture model; demo-base is the one that is
    shipped, smollm2-135m a real one."""
    revision: Name | None = None
    """Hub revision (branch, tag or commit)."""
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation of transformers. What is measured and evaluated is in fp32, which
    flash_attention_2 does not compute: there sdpa stands in for it."""
    config: dict[str, Any] | None = None
    """LlamaConfig fields: start from random weights of this shape instead of a checkpoint."""
    tokenizer: PathName | None = None
    """Folder or hub name of the tokenizer (default: model.path)."""

    @property
    def fp32_attention(self) -> str:
        """The implementation outside of trainings, where models compute in fp32."""
        return "sdpa" if self.attention == "flash_attention_2" else self.attention


def as_sources(value: Any) -> Any:
    """A bare path or a bare mapping as the list of sources that it abbreviates."""
    if isinstance(value, str | dict | BaseModel):
        value = [value]
    if isinstance(value, list | tuple):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


class DataSource(Section):
    """One text source of a mixture."""

    path: PathName
    """Hub name, local .jsonl, .json, .parquet, .arrow, .txt or folder, or stdlib (the demo's)."""
    subset: Name | None = None
    """Configuration of a hub dataset, such as 20231101.en, or of a folder whose README.md lists
    some."""
    split: Name = "train"
    """Split to read, or a part of it such as train[:10%]."""
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
    """Fraction of the training documents held out, or of the characters of a lone one, at its end;
    needed when validation is absent."""
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

    @model_validator(mode="before")
    @classmethod
    def _records_are_masked(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("format") in ("alpaca", "chat"):
            return {"document_mask": True, **value}
        return value

    def _validation_text(self) -> Iterator[str]:
        if self.validation is None and self.validation_fraction == 0:
            yield "no held-out text; set data.validation or data.validation_fraction"
        if self.validation is not None and self.validation_fraction > 0:
            yield "validation and validation_fraction exclude each other; keep one of them"

    def _documents(self) -> Iterator[str]:
        if self.format != "text" and not self.document_mask:
            yield f"format {self.format} never lets records see each other; remove document_mask"

    def _whole(self) -> Iterator[str]:
        if self.format != "text" and self.streaming:
            yield f"format {self.format} is read whole; set data.streaming=false"

    def _template(self) -> Iterator[str]:
        if self.format == "chat" and not (self.bos and self.eos):
            yield "format chat takes BOS and EOS from the template; remove bos and eos"

    def _columns(self) -> Iterator[str]:
        if self.format == "text":
            return
        fields = "instruction, input and output" if self.format == "alpaca" else "messages"
        for source in (*self.train, *(self.validation or ())):
            if source.text != "text":
                yield f"format {self.format} reads {fields}; remove text: {source.text}"

    def _subsets(self) -> Iterator[str]:
        for source in (*self.train, *(self.validation or ())):
            if source.subset is not None and source.path == "stdlib":
                yield f"stdlib has no subsets; remove subset: {source.subset}"

    rules = (_validation_text, _documents, _whole, _template, _columns, _subsets)
