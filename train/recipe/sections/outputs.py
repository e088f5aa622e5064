"""The sections of a recipe for what comes out: exports, and how models are evaluated."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from train.recipe.sections.base import (
    Positive,
    Section,
    distinct,
)

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def shard_bytes(text: str) -> int:
    """Bytes of a size such as `2GB`, `500MB` or `1.5GiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size; write for example 500MB or 2GB")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def _size(text: str) -> str:
    shard_bytes(text)
    return text


class ExportSection(Section):
    """The folders that are shipped."""

    formats: Annotated[
        tuple[Literal["compact", "dense", "gguf"], ...],
        Field(strict=False, min_length=1),
        AfterValidator(distinct),
    ] = ("compact", "dense")
    """compact: each shared unit stored once; dense: a stock LlamaForCausalLM; gguf: a file for
    llama.cpp."""
    gguf: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] | None = None
    """Type of the matrices in the GGUF file (default: as `dtype`)."""
    dtype: Literal["float32", "bfloat16", "float16", "base"] = "base"
    """Data type of the exported weights; base: that of the base model."""
    shard_size: Annotated[str, AfterValidator(_size)] = "2GB"
    """Largest safetensors file, such as 500MB or 2GB."""

    @property
    def allows_spans(self) -> bool:
        """Whether what is asked for has a form of a plan with spans."""
        return self.formats != ("dense",) and "gguf" not in self.formats

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
    directshare: bool = False
    """Also measure DirectShare as published: q, k and v of the pairs whose q and k are most alike
    tied, as many as save what the plan saves, untrained."""
