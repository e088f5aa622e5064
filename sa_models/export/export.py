"""Export: compact, dense and GGUF folders from dense weights and a plan.

Tensors are read, materialized, written and verified one at a time, so that the memory is that of
about one shard. A folder is written beside, verified from its own files, then renamed into place:
either it is whole, or it is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from sa_models.errors import PostshareError
from sa_models.export.gguf.form import kind_of
from sa_models.export.gguf.layout import Kind
from sa_models.export.job import ExportJob, Progress
from sa_models.export.manifest import (
    Identity,
    read_manifest,
)
from sa_models.export.peft_adapter import Pairs, rounded
from sa_models.materialize.low_rank_residual import pairs_hash
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.registry import Merge
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import DenseReader, ExpandedFolder
from sa_models.weights.structure import Leaders, converted

Format = Literal["compact", "dense", "gguf"]
FORMATS: tuple[Format, ...] = ("compact", "dense")
"""What is exported where nothing else is asked for."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExportResult:
    """The finished folders, and the bytes of their tensors on disk (headers left out)."""

    paths: dict[str, Path]
    bytes: dict[str, int]


def export_model(
    source: DenseReader,
    plan: SharingPlan,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    formats: Sequence[Format] = FORMATS,
    gguf: Kind | None = None,
    merge: Merge = "copy",
    leaders: Leaders = "mean",
    residual: Pairs | None = None,
    base_config: LlamaConfig | None = None,
    base: Path | None = None,
    tokenizer: Path | PreTrainedTokenizerBase | None = None,
    recipe: Mapping[str, Any] | None = None,
    written: str | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write ``folder/compact``, ``folder/dense`` and ``folder/gguf`` (a plan with spans has the
    compact form alone).

    Of a plan that removes as many units from every layer the dense folder has what is left, as the
    compact one has: a stock Llama with fewer heads.

    Of a plan with a basis the compact folder has the factors, the dense one their products, rounded
    once: they compute the same to rounding.

    With residuals the compact folder goes with ``folder/adapter``, a PEFT adapter, and the dense
    one is what the two compute: compact expanded + B A, of the values that are stored. The GGUF
    file is made of the dense weights.

    A finished folder of the same export is left as it is; what an interrupted export left is
    removed and made again.

    Args:
        source: dense weights before materializing (a ``WeightsFolder``), a folder trained with the
            plan's structure, or a healed compact folder (an ``ExpandedFolder``, with the same plan
            and ``merge="copy"``). What lacks the plan's structure is converted to it. Of a plan
            with a basis: the ``ExpandedFolder`` of its factors.
        plan: what to share; of a ``released`` plan the effective ties.
        dtype: of all exported tensors.
        shard_bytes: largest size of a weight file, in bytes; a GGUF file is always one.
        gguf: type of its matrices; None: that of ``dtype``.
        merge: whether a shared unit is its source's, or the mean of all units that share it; see
            :mod:`sa_models.materialize.merge` for the others.
        leaders: see :mod:`~sa_models.weights.structure`; of a source that is converted.
        residual: of the plan's tied units, see :mod:`~sa_models.materialize.low_rank_residual`.
        base_config: of the model that the savings are counted from; None: the source's.
        base: the folder of the base model, whose generation config and licence files are copied;
            None: the source's.
        tokenizer: a tokenizer, or the folder of one, whose licence files are copied as well; None
            exports a model without a tokenizer.
        recipe: the resolved recipe, for the manifest (JSON values).
        written: the recipe as it was written, a file of the folder.
        notes: of the model card and the manifest: "name" (str), "base_model" (str), "figures"
            ({what: words}), "numbers" ({"perplexity": {model: value}, ...}). What is measured
            later is added with :func:`~sa_models.export.manifest.update_notes`.
        progress: see :data:`Progress`.

    Raises:
        PostshareError: the plan does not fit; the folder holds something else; the disk is full;
            fp16 cannot hold a weight; GGUF cannot express the model or the package gguf is missing;
            or the verification fails. Nothing half written stays.
    """
    folder = Path(folder)
    _check_arguments(formats, dtype, plan)
    plan.validate(source.config)
    serves = any(span.share == "kv" for span in plan.spans)
    weights: MaterializedReader | ExpandedFolder
    if plan.basis is None:
        weights = MaterializedReader(converted(source, plan, leaders), plan, merge, dtype)
    elif isinstance(source, ExpandedFolder) and source.plan == plan:
        weights = ExpandedFolder(source.path, dtype)
    else:
        raise PostshareError(
            f"{source.path} has not the plan's factors, which calibration text decides; give the "
            "folder of the factorized model"
        )
    job = ExportJob(
        folder=folder,
        weights=weights,
        residual=None if residual is None else rounded(residual, dtype),
        plan=plan.effective(),
        savings=plan.savings(base_config or source.config),
        identity=Identity(
            plan.effective().hash(),
            merge,
            str(dtype)[6:],
            shard_bytes,
            leaders=leaders if serves else None,
            residual_sha256=None if residual is None else pairs_hash(residual),
        ),
        dtype=dtype,
        shard_bytes=shard_bytes,
        base=base,
        tokenizer=tokenizer,
        written=written,
        notes={**(notes or {}), "recipe": recipe},
        progress=progress or (lambda stage, done, total: None),
    )
    if "gguf" in formats:
        job.gguf = job.gguf_form(gguf or kind_of(dtype))
    kinds = [*formats, *(["adapter"] if residual and "compact" in formats else [])]
    todo = [name for name in kinds if not job.is_finished(name)]
    if todo:
        job.check_space(todo)
        with one_thread(), job.new_folders(todo) as made:
            job.make(made)
    return ExportResult(
        paths={name: folder / name for name in kinds},
        bytes={name: read_manifest(folder / name)["tensors"]["bytes"] for name in kinds},
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operators in the calling thread.

    Memory and disk bound the work, which is divided by files: on two busy cores, operators that
    wait for one another's threads took 2.5 times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_arguments(formats: Sequence[str], dtype: torch.dtype, plan: SharingPlan) -> None:
    known = get_args(Format)
    if not formats or not set(known).issuperset(formats):
        raise PostshareError(f"unknown export formats {list(formats)}; use {list(known)}")
    if "dense" in formats and not plan.has_stock_form:
        raise PostshareError(
            "a plan with spans has no dense form: no stock Llama computes it; export with "
            "formats [compact]"
        )
    if dtype not in DTYPES:
        raise PostshareError(f"cannot export as {dtype}; use float32, bfloat16 or float16")
