"""Panels of the dashboard: the metrics that a run logs, by section.

Every key is a column of `metrics.jsonl`, or, in the last section, a number of `summary.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

X_AXIS = "tokens"
"""Predicted tokens so far: what makes runs with other batch sizes comparable."""


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        keys: of a scatter plot, what is across and what is up.
        kind: lines are drawn over tokens, bars and points from a run's summary.
    """

    title: str
    keys: tuple[str, ...]
    kind: Literal["lines", "bars", "points"] = "lines"


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "loss": (
        Panel("Loss, nats per token", ("lm_loss", "total_loss")),
        Panel("Validation loss, nats per token", ("validation_loss",)),
        Panel("Validation perplexity", ("validation_perplexity",)),
        Panel("Terms of the teacher", ("distill_loss", "hidden_loss", "attention_loss")),
        Panel("Loss of the worst rank", ("lm_loss_max",)),
    ),
    "penalty": (
        Panel("Penalty", ("penalty",)),
        Panel("Gradient norm before clipping", ("gradient_norm",)),
        Panel("Learning rate", ("learning_rate",)),
        Panel("Bytes that the penalty sends in a step", ("penalty_bytes",)),
    ),
    "pairs": (
        Panel("Distance of pairs", ("pair_distance_mean", "pair_distance_worst")),
        Panel("Cosine of pairs", ("pair_cosine_mean", "pair_cosine_worst")),
        Panel("Pairs that are equal", ("pairs_merged",)),
        Panel("Distances of all pairs", ("pair_distances",)),
    ),
    "systems": (
        Panel("Tokens per second", ("tokens_per_second",)),
        Panel(
            "Seconds of a step, and of them waiting for data",
            ("step_seconds", "data_wait_seconds", "data_wait_seconds_max"),
        ),
        Panel("Peak memory, bytes", ("memory_bytes", "memory_bytes_max")),
        Panel("Seconds of a rank by itself", ("rank_seconds_median", "rank_seconds_max")),
        Panel("Slowest rank", ("slowest_rank",)),
    ),
    "evaluation": (
        Panel("Perplexity against bytes", ("bytes/compact", "perplexity/post"), "points"),
        Panel(
            "Perplexity",
            ("perplexity/base", "perplexity/continued", "perplexity/direct", "perplexity/post"),
            "bars",
        ),
        Panel("Bytes of the weights", ("bytes/base", "bytes/compact", "bytes/dense"), "bars"),
        Panel(
            "Heads that changed, attention parameters that are no longer stored",
            ("heads/requested_ratio", "heads/effective_ratio", "parameters/stored_ratio"),
            "bars",
        ),
        Panel(
            "Elements of the cache for each token",
            ("cache/base_elements_per_token", "cache/stored_elements_per_token"),
            "bars",
        ),
    ),
}


def keys(*sections: str) -> set[str]:
    """All that the panels of these sections show."""
    return {key for name in sections for panel in SECTIONS[name] for key in panel.keys}


def evaluation_values(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of ``summary.json``, such as ``perplexity/post``; what is null is left out."""
    return dict(_numbers(summary, ""))


def _numbers(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _numbers(entry, f"{prefix}{key}/")
        elif isinstance(entry, int | float):
            yield prefix + key, entry
