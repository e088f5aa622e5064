"""The GGUF form of a model: of one that is exported, and of a folder that is converted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from sa_models.atomic_files import new_file
from sa_models.errors import PostshareError
from sa_models.export.gguf.file import GgufForm, require_gguf
from sa_models.export.gguf.layout import BLOCKS, FILE_TYPES, GgufLayout, Kind
from sa_models.export.gguf.vocabulary import vocabulary
from sa_models.export.quantized_folder import is_quantized
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import ExpandedFolder, dense_config, open_weights
from sa_models.weights.companion_files import licence_of
from sa_models.weights.config_file import read_generation_config

KINDS: tuple[Kind, ...] = tuple(BLOCKS)
SUFFIX = ".gguf"
_OF_DTYPE: dict[torch.dtype, Kind] = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


def kind_of(dtype: torch.dtype) -> Kind:
    """The type of a file whose values are those of an export in ``dtype``."""
    return _OF_DTYPE[dtype]


def gguf_form(
    config: LlamaConfig,
    plan: SharingPlan,
    to: Kind,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    origin: Path | None = None,
    pre: str | None = None,
    name: str | None = None,
    licence: Mapping[str, str] | None = None,
) -> GgufForm:
    """Everything of a file but its weights.

    Args:
        config: dense, of the base or with the plan's KV heads.
        origin: a folder whose ``generation_config.json`` says what ends an answer.
        pre: see :func:`~sa_models.export.gguf.vocabulary.vocabulary`.
        name, licence: that tools show of the file.

    Raises:
        PostshareError: the package gguf is missing; or GGUF cannot express the plan, the model or
            its tokenizer.
    """
    require_gguf()
    layout = GgufLayout(config, plan, to)
    if tokenizer is None:
        raise PostshareError(
            "a GGUF file holds the tokenizer, and the model has none; set model.tokenizer, or "
            "leave GGUF out"
        )
    stops = [] if origin is None else read_generation_config(config, origin).eos_token_id
    ends = stops if isinstance(stops, list) else [] if stops is None else [stops]
    general: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.license": (licence or {}).get("license"),
        "general.file_type": FILE_TYPES[to],
        "general.quantization_version": 2,
    }
    return GgufForm(
        layout,
        {
            **{key: value for key, value in general.items() if value is not None},
            **layout.keys(),
            **vocabulary(tokenizer, config, ends, pre),
        },
    )


def convert_folder(
    source: str | os.PathLike[str],
    file: str | os.PathLike[str],
    to: str,
    tokenizer: PreTrainedTokenizerBase,
    pre: str | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> GgufForm:
    """Write a dense or compact folder as one verified GGUF file.

    Args:
        to: one of :data:`KINDS`.
        file: to make; it must not exist.
        progress: called with "write" or "verify", bytes done, bytes in all.

    Raises:
        PostshareError: see :func:`gguf_form`; an argument is wrong, the source is quantized, the
            disk is full, or the file reads otherwise than it was written. Nothing half written
            stays.
    """
    source, file = Path(source), Path(file)
    kind = next((kind for kind in KINDS if kind == to), None)
    if kind is None:
        raise PostshareError(f"cannot write GGUF as {to!r}; use one of {', '.join(KINDS)}")
    if file.suffix != SUFFIX:
        raise PostshareError(f"{file} does not end in {SUFFIX}; name the file NAME{SUFFIX}")
    if file.exists():
        raise PostshareError(f"{file} is there already; choose another file or delete it")
    require_gguf()
    weights = open_weights(source)
    if is_quantized(source):
        raise PostshareError(
            f"{source} is quantized already; convert the export that it was made from"
        )
    plan = weights.plan if isinstance(weights, ExpandedFolder) else SharingPlan()
    form = gguf_form(
        dense_config(weights.config),
        plan,
        kind,
        tokenizer,
        origin=source,
        pre=pre,
        name=file.stem,
        licence=licence_of(source, source),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if form.nbytes > (free := shutil.disk_usage(file.parent).free):
            raise PostshareError(
                f"{file} needs {form.nbytes / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free; free "
                "disk space or choose another folder"
            )
        with new_file(file) as beside:
            form.write(beside, weights, _counted(form, "write", progress))
            form.verify(beside, weights, _counted(form, "verify", progress))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise PostshareError(
            f"{file} could not be written ({reason}); free disk space or choose another folder"
        ) from error
    return form


def _counted(
    form: GgufForm, stage: str, progress: Callable[[str, int, int], None]
) -> Callable[[int], None]:
    sizes = accumulate(tensor.nbytes for tensor in form.layout.tensors)
    return lambda size: progress(stage, next(sizes), form.nbytes)


__all__ = ["KINDS", "convert_folder", "gguf_form", "kind_of"]
