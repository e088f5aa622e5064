"""Results of `postshare compare`: perplexities with confidence intervals, and their table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from train.evaluation.bootstrap import interval, mean_loss
from train.evaluation.perplexity import BlockLosses


@dataclass(frozen=True)
class Entry:
    """One row: a model, or the same kind of model of several seeds.

    Attributes:
        losses: of each seed, on the same blocks; of one entry where no seed enters (base, direct).
        bytes: of the exported weights, None where nothing is exported.
        parameters: stored.
    """

    name: str
    what: str
    losses: tuple[BlockLosses, ...]
    parameters: int
    bytes: int | None

    @property
    def loss(self) -> float:
        """Nats per token, the mean over the seeds."""
        return mean_loss(self.losses)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss: the geometric mean over the seeds."""
        return math.exp(self.loss)


def table(entries: Sequence[Entry], reference: str) -> Table:
    """The comparison; differences are from the entry named `reference`."""
    by_name = {entry.name: entry for entry in entries}
    against = by_name[reference]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("model", "perplexity", f"vs {reference}", "95 %", "parameters", "bytes")
    for column in columns:
        shown.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for entry in entries:
        change = spread = ""
        if entry is not against:
            low, high = interval(entry.losses, against.losses)
            change = f"{math.expm1(entry.loss - against.loss):+.1%}"
            spread = f"{math.expm1(low):+.1%} to {math.expm1(high):+.1%}"
        size = "" if entry.bytes is None else f"{entry.bytes:,}"
        shown.add_row(
            entry.name, f"{entry.perplexity:.2f}", change, spread, f"{entry.parameters:,}", size
        )
    return shown


def verdict(entries: Sequence[Entry], recipe: str, controls: Sequence[str]) -> str:
    """Which control is best, and whether the recipe differs from it by more than chance."""
    by_name = {entry.name: entry for entry in entries}
    own = by_name[recipe]
    best = min((by_name[name] for name in controls), key=lambda entry: entry.loss)
    low, high = interval(own.losses, best.losses)
    change = f"{math.expm1(own.loss - best.loss):+.1%}"
    if low <= 0 <= high:
        blocks, seeds = len(own.losses[0].tokens), len(own.losses)
        return (
            f"the recipe and {best.name}, the best control, cannot be told apart ({change}; "
            f"95 %: {math.expm1(low):+.1%} to {math.expm1(high):+.1%}) with {seeds} "
            f"seed{'s' if seeds > 1 else ''} and {blocks} held-out blocks; raise --seeds, "
            "evaluate.blocks or train.steps"
        )
    who = "better than" if high < 0 else "worse than"
    advice = "" if high < 0 else f"; use {best.name} instead"
    return f"the recipe is {who} {best.name}, the best control ({change}){advice}"


def as_json(entries: Sequence[Entry], reference: str) -> list[dict[str, Any]]:
    """The rows of ``comparison.json``; differences in nats per token."""
    against = next(entry for entry in entries if entry.name == reference)
    return [
        {
            "name": entry.name,
            "what": entry.what,
            "perplexity": entry.perplexity,
            "perplexities": [one.perplexity.perplexity for one in entry.losses],
            "loss": entry.loss,
            "loss_interval": interval(entry.losses),
            "above_reference": entry.loss - against.loss,
            "above_reference_interval": interval(entry.losses, against.losses),
            "parameters": entry.parameters,
            "bytes": entry.bytes,
        }
        for entry in entries
    ]
