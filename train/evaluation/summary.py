"""The summary of a run: the same held-out tokens for all its models, and the last table."""

from __future__ import annotations

import gc
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import PreTrainedModel

from sa_models.atomic_files import write_json
from sa_models.errors import PostshareError
from sa_models.heads import unit_name
from sa_models.plan import SharingPlan
from sa_models.savings import PlanSavings
from sa_models.weights.whole_model import open_stored
from train.common.identity import identity_hash
from train.common.run_files import BLOCKS_FILE
from train.data.blocks import Blocks, blocks_hash
from train.evaluation.figures import DecodeRatio, Figures
from train.evaluation.perplexity import BlockLosses, Perplexity, block_losses

EVALUATION_FILE = "evaluation.json"
VERSION = 1
"""Of what is computed: raise it when a loss is computed otherwise."""

MODELS = {
    "base": "base",
    "continued": "continued",
    "direct": "DirectShare",
    "post": "PostShare",
}
STRUCTURED = MODELS | {"direct": "direct", "post": "post-trained"}
"""With removed units, spans, fewer KV heads or a basis it is not the PostShare paper's method."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of a run.

    Attributes:
        load: makes it, on the CPU.
        made_of: all that decides its outputs beyond rounding (hashes of weights, the plan, the
            attention implementation), JSON-ready.
    """

    load: Callable[[], PreTrainedModel]
    made_of: dict[str, Any]


def evaluate_models(
    models: Mapping[str, EvaluatedModel],
    blocks: Blocks,
    batch_size: int,
    limit: int | None,
    device: torch.device,
    folder: Path,
    say: Callable[[str], None] = print,
    also: Callable[[str, PreTrainedModel], None] = lambda name, model: None,
) -> dict[str, Perplexity]:
    """Perplexity of each model on the same blocks, one model in memory at a time.

    Writes ``evaluation.json``, and the loss of each block (``evaluation-blocks.json``). What this
    holds already of these very models and blocks is not measured again: an entry names both by a
    hash. The batch size is no part of it, nor is the device: they change a loss by rounding.

    Args:
        say: is told which models are measured again, and why.
        also: called with the name and the model of each that is measured, while it is in memory.

    Raises:
        PostshareError: there is no token to predict, or a model's loss is not finite.
    """
    count = min(len(blocks), limit or len(blocks))
    text = blocks_hash(blocks[index] for index in range(count))
    keys = {
        name: identity_hash({"version": VERSION, "text": text, "model": model.made_of})
        for name, model in models.items()
    }
    held = _read_entries(folder)
    known = {n: e for n, e in held.items() if e.get("of") == keys.get(n)}
    stale = [name for name in models if name in held and name not in known]
    if stale:
        unsaid = all("of" not in held[name] for name in stale)
        reason = (
            f"{BLOCKS_FILE} is of an earlier version, which does not say what was measured"
            if unsaid
            else "their weights or the held-out text are not those that were measured"
        )
        say(f"measured again: {', '.join(stale)} ({reason})")
    measured = {name: _losses(entry) for name, entry in known.items()}
    for name, model in models.items():
        if name in measured:
            continue
        loaded = model.load()
        loaded.to(device)  # type: ignore[arg-type]  # transformers' decorator hides it
        measured[name] = block_losses(loaded, blocks, batch_size, limit=limit, name=name)
        also(name, loaded)
        del loaded
        gc.collect()  # the projections of a compact model refer to each other
        try:
            found = {n: asdict(b.perplexity) for n, b in measured.items()}
        except PostshareError as error:
            raise PostshareError(f"{name}: {error}") from None
        write_json(folder / EVALUATION_FILE, {"blocks": count, "models": found})
        entries = {n: {"of": keys[n], **asdict(b)} for n, b in measured.items()}
        write_json(folder / BLOCKS_FILE, entries)
    return {name: measured[name].perplexity for name in models}


def read_block_losses(folder: Path) -> dict[str, BlockLosses]:
    """What ``evaluation-blocks.json`` of a run folder holds, by model; nothing where it is not."""
    return {name: _losses(entry) for name, entry in _read_entries(folder).items()}


def _read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / BLOCKS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _losses(entry: Mapping[str, Any]) -> BlockLosses:
    return BlockLosses(tuple(entry["nats"]), tuple(entry["tokens"]))


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
    *,
    element_bytes: int,
    positions: int,
    residual: int = 0,
    decode: DecodeRatio | None = None,
    directshare: PlanSavings | None = None,
) -> dict[str, Any]:
    """The value of ``summary.json``; a model that the run does not have is null.

    Args:
        requested: the ratio of heads that the recipe asks for.
        disk: bytes of the weight files, by ``base``, ``compact``, ``adapter``, ``dense`` and
            ``gguf``.
        residual: parameters of the adapter, which belong to what is stored.
        element_bytes: of one exported parameter.
        positions: the most tokens that the model reads.
        decode: of the plan, where it was measured.
        directshare: of DirectShare as published, where it was evaluated beside the plan.
    """
    stored_ratio = savings.stored_ratio - residual / savings.attention_parameters
    summary: dict[str, Any] = {
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
        "units": {
            "name": unit_name(savings.heads, savings.units),
            "total": savings.units,
            "tied": savings.tied_units,
            "removed": savings.removed_units,
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
        "bytes": {"base": None, "compact": None, "adapter": None, "dense": None, **disk},
        "tokens": training.tokens,
        "seconds": training.seconds,
    }
    of_plan = Figures.of_plan(savings, element_bytes, positions, residual)
    figures = replace(
        of_plan,
        weight_bytes=bytes_of(summary, "post") or of_plan.weight_bytes,
        decode=decode,
        perplexity=_against_continued(summary["perplexity"]),
    )
    if directshare is not None:
        summary["directshare"] = {
            "perplexity": measured["directshare"].perplexity,
            "units": directshare.tied_units,
            "parameters": directshare.stored_parameters,
        }
    return {**summary, "figures": asdict(figures)}


def figures_of(summary: Mapping[str, Any]) -> Figures | None:
    """The four figures of a run; None where ``summary.json`` is of an earlier version."""
    return Figures.from_dict(summary["figures"]) if "figures" in summary else None


def _against_continued(perplexity: Mapping[str, float | None]) -> float | None:
    """Of what the run ships: *post*, or where it trains nothing *direct*."""
    shipped = perplexity["post"] or perplexity["direct"]
    reference = perplexity["continued"]
    return shipped / reference if shipped and reference else None


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors of a folder, without what its model does not have; of a GGUF
    file."""
    if not (folder / "config.json").is_file():  # an adapter, or GGUF
        files = (*folder.glob("*.safetensors"), *folder.glob("*.gguf"))
        return sum(file.stat().st_size for file in files)
    weights = open_stored(folder)
    return sum(file.stat().st_size for file in weights.shards()) - weights.left_over()


def summary_table(summary: dict[str, Any]) -> Table:
    """What a run is judged by, as one table."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    columns, rows = summary_cells(summary)
    for column in columns:
        left = column == "model"
        heading = textwrap.fill(column, 10)  # for the numbers of a 70B, 80 columns are few
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows.values():
        table.add_row(*row)
    return table


def summary_cells(summary: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Headings, and the cells of each model that the run has, for the terminal and the report."""
    structured = is_structured(summary)
    units = units_of(summary)
    what, changed = ("cache", "") if structured else _changed_units(units)
    reference = summary["perplexity"]["continued"]
    cache = summary["cache"]

    def row(name: str, value: float, held: str, parameters: int, size: int | None) -> list[str]:
        against = f"{value / reference - 1:+.1%}" if reference and name != "continued" else ""
        return [
            *(names[name], f"{value:.2f}"),
            *([against] if reference else []),
            *(held, f"{parameters:,}", "" if size is None else f"{size:,}"),
        ]

    names = {**model_names(summary), "directshare": MODELS["direct"]}
    published = summary.get("directshare")
    rows = {}
    for name in MODELS:
        if name == "direct" and published is not None:
            held = "100.0%" if structured else f"{published['units']}/{units['total']}"
            # It is not exported, and has no size on disk.
            found = published["perplexity"], held, published["parameters"], None
            rows["directshare"] = row("directshare", *found)
        if (value := summary["perplexity"][name]) is None:
            continue
        shared = name in ("direct", "post")
        kept = cache["stored_elements_per_token"] / cache["base_elements_per_token"]
        held = f"{kept if shared else 1:.1%}" if structured else (changed if shared else "0")
        rows[name] = row(name, value, held, parameters_of(summary, name), bytes_of(summary, name))
    control = ["vs continued"] if reference else []
    return ["model", "perplexity", *control, what, "parameters", "bytes"], rows


def units_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Units in all, tied and removed, and what a unit is called; an earlier version wrote down
    heads alone."""
    return summary.get("units") or {"name": "heads", **summary["heads"]}


def is_structured(summary: dict[str, Any]) -> bool:
    """Whether the plan has spans, fewer KV heads or a shared basis."""
    return any(summary["structure"].values())


def model_names(summary: dict[str, Any]) -> dict[str, str]:
    """What each model of a run is called; "DirectShare" is the control, where there is one."""
    others = is_structured(summary) or summary["heads"]["removed"] or "directshare" in summary
    return STRUCTURED if others else MODELS


def _changed_units(units: dict[str, Any]) -> tuple[str, str]:
    """The column for the units that a plan changes: its heading and its value."""
    tied, removed, total = units["tied"], units["removed"], units["total"]
    if not removed:
        return f"{units['name']} tied", f"{tied}/{total}"
    if not tied:
        return f"{units['name']} removed", f"{removed}/{total}"
    return f"{units['name']} tied + removed", f"{tied} + {removed}/{total}"


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
    """Which units change, and what is no longer stored, in one line."""
    parameters, units = summary["parameters"], units_of(summary)
    saved = parameters["base"] - parameters["stored"]
    changed = ", ".join(
        f"{units[what] / units['total']:.1%} of the {units['name']} {what}"
        for what in ("tied", "removed")
        if units[what]
    )
    line = (
        f"saved     {f'{changed}: ' if changed else ''}"
        f"{parameters['stored_ratio']:.1%} of the attention parameters, "
        f"{saved / parameters['base']:.1%} of all parameters"
    )
    if parameters["adapter"]:
        line += f" (residuals of {parameters['adapter']:,} parameters counted)"
    return line
