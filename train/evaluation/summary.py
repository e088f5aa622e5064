"""The summary of a run: the same held-out tokens for all its models, and the last table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import PreTrainedModel

from sa_models.atomic_files import write_json
from sa_models.plan import SharingPlan
from sa_models.savings import PlanSavings
from train.common.run_files import BLOCKS_FILE
from train.data.blocks import Blocks
from train.evaluation.perplexity import BlockLosses, Perplexity, block_losses

EVALUATION_FILE = "evaluation.json"

MODELS = {
    "base": "base",
    "continued": "continued",
    "direct": "DirectShare",
    "post": "PostShare",
}
STRUCTURED = MODELS | {"direct": "direct", "post": "post-trained"}
"""With removed units, spans, fewer KV heads or a basis it is not the PostShare paper's method."""


def evaluate_models(
    models: dict[str, Callable[[], PreTrainedModel]],
    blocks: Blocks,
    batch_size: int,
    limit: int | None,
    device: torch.device,
    folder: Path,
) -> dict[str, Perplexity]:
    """Perplexity of each model on the same blocks, one model in memory at a time.

    Writes ``evaluation.json``, and the loss of each block (``evaluation-blocks.json``); what this
    holds already for these blocks is not measured again.
    """
    count = min(len(blocks), limit or len(blocks))
    measured = {n: b for n, b in read_block_losses(folder).items() if len(b.nats) == count}
    for name, load in models.items():
        if name not in measured:
            model = load()
            model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
            measured[name] = block_losses(model, blocks, batch_size, limit=limit)
            found = {n: asdict(b.perplexity) for n, b in measured.items()}
            write_json(folder / EVALUATION_FILE, {"blocks": count, "models": found})
            write_json(folder / BLOCKS_FILE, {n: asdict(b) for n, b in measured.items()})
    return {name: measured[name].perplexity for name in models}


def read_block_losses(folder: Path) -> dict[str, BlockLosses]:
    """What ``evaluation-blocks.json`` of a run folder holds, by model; nothing where it is not."""
    file = folder / BLOCKS_FILE
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return {n: BlockLosses(tuple(b["nats"]), tuple(b["tokens"])) for n, b in value.items()}


@dataclass(frozen=True)
class TrainingCost:
    """What the post-training took. Tokens are predicted tokens over all ranks."""

    tokens: int
    seconds: float


def summarize(
    measured: dict[str, Perplexity],
    plan: SharingPlan,
    savings: PlanSavings,
    requested: float,
    disk: dict[str, int],
    training: TrainingCost,
    residual: int = 0,
) -> dict[str, Any]:
    """The value of ``summary.json``; a model that the run does not have is null.

    Args:
        requested: the ratio of heads that the recipe asks for.
        disk: bytes of the weight files, by ``base``, ``compact``, ``adapter`` and ``dense``.
        residual: parameters of the adapter, which belong to what is stored.
    """
    stored_ratio = savings.stored_ratio - residual / savings.attention_parameters
    return {
        "perplexity": {
            name: measured[name].perplexity if name in measured else None for name in MODELS
        },
        "heads": {
            "requested_ratio": requested,
            "effective_ratio": savings.effective_ratio,
            "total": savings.heads,
            "tied": savings.tied_heads,
            "removed": savings.removed_heads,
        },
        "parameters": {
            "base": savings.base_parameters,
            "stored": savings.stored_parameters + residual,
            "adapter": residual,
            "stored_ratio": stored_ratio,
        },
        "structure": {
            "kv_heads": plan.kv_heads,
            "spans": [span.to_dict() for span in plan.spans],
            "basis": None if plan.basis is None else plan.basis.to_dict(),
        },
        "cache": {
            "base_elements_per_token": savings.base_cache,
            "stored_elements_per_token": savings.stored_cache,
        },
        "bytes": {name: disk.get(name) for name in ("base", "compact", "adapter", "dense")},
        "tokens": training.tokens,
        "seconds": training.seconds,
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def summary_table(summary: dict[str, Any]) -> Table:
    """What a run is judged by, as one table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns, rows = summary_cells(summary)
    for column in columns:
        left = column == "model"
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows.values():
        table.add_row(*row)
    return table


def summary_cells(summary: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Headings, and the cells of each model that the run has, for the terminal and the report."""
    heads = summary["heads"]
    structured = is_structured(summary)
    what, changed = ("cache", "") if structured else _changed_heads(heads)
    reference = summary["perplexity"]["continued"]
    cache = summary["cache"]
    rows = {}
    for name, label in model_names(summary).items():
        value = summary["perplexity"][name]
        if value is None:
            continue
        shared = name in ("direct", "post")
        kept = cache["stored_elements_per_token"] / cache["base_elements_per_token"]
        rows[name] = [
            label,
            f"{value:.2f}",
            f"{value / reference - 1:+.1%}" if reference and name != "continued" else "",
            (f"{kept:.1%}" if shared else "100%") if structured else (changed if shared else "0"),
            f"{parameters_of(summary, name):,}",
            "" if (held := bytes_of(summary, name)) is None else f"{held:,}",
        ]
    return ["model", "perplexity", "vs continued", what, "parameters", "bytes"], rows


def is_structured(summary: dict[str, Any]) -> bool:
    """Whether the plan has spans, fewer KV heads or a shared basis."""
    return any(summary["structure"].values())


def model_names(summary: dict[str, Any]) -> dict[str, str]:
    """What each model of a run is called."""
    papers = not (is_structured(summary) or summary["heads"]["removed"])
    return MODELS if papers else STRUCTURED


def _changed_heads(heads: dict[str, Any]) -> tuple[str, str]:
    """The column for the heads that a plan changes: its heading and its value."""
    tied, removed, total = heads["tied"], heads["removed"], heads["total"]
    if not removed:
        return "heads tied", f"{tied}/{total}"
    if not tied:
        return "removed", f"{removed}/{total}"
    return "changed", f"{tied} + {removed}/{total}"  # no longer word fits 80 columns


def parameters_of(summary: dict[str, Any], name: str) -> int:
    """Parameters that are stored of a model; *direct* has no residuals."""
    parameters = summary["parameters"]
    if name not in ("direct", "post"):
        return int(parameters["base"])
    return int(parameters["stored"]) - (int(parameters["adapter"]) if name == "direct" else 0)


def bytes_of(summary: dict[str, Any], name: str) -> int | None:
    """Bytes of a model's weights; *continued* is as large as the base, and the base's is known.

    Of a shared model those of the compact folder, and of the adapter that belongs to it.
    """
    size = summary["bytes"]
    if name not in ("direct", "post"):
        return size["base"]
    if size["compact"] is None:
        return size["dense"]
    return size["compact"] + (size["adapter"] or 0 if name == "post" else 0)


def saved_sentence(summary: dict[str, Any]) -> str:
    """What sharing saves, in one line."""
    parameters, size = summary["parameters"], summary["bytes"]
    saved = parameters["base"] - parameters["stored"]
    heads = summary["heads"]
    changed = ", ".join(
        f"{heads[what] / heads['total']:.1%} of the heads {what}"
        for what in ("tied", "removed")
        if heads[what]
    )
    line = (
        f"saved     {f'{changed}: ' if changed else ''}"
        f"{parameters['stored_ratio']:.1%} of the attention parameters, "
        f"{saved / parameters['base']:.1%} of all parameters"
    )
    cache = summary["cache"]
    if cache["stored_elements_per_token"] != cache["base_elements_per_token"]:
        kept = cache["stored_elements_per_token"] / cache["base_elements_per_token"]
        line += f", {1 - kept:.1%} of the KV cache"
    if size["compact"] and size["dense"]:
        line += f", {size['dense'] - size['compact'] - (size['adapter'] or 0):,} bytes"
    if parameters["adapter"]:
        line += f" (residuals of {parameters['adapter']:,} parameters counted)"
    return line
