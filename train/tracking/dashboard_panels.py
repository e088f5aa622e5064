"""Panels of the dashboard: the metrics that a run logs, by section.

Every key is wandb's name of a column of `metrics.jsonl`, or, in the last section, of a number of
`summary.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from train.tracking.wandb_names import OURS, wandb_name

X_AXIS = wandb_name("tokens")
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
        Panel("Loss, nats per token", ("train/loss", "postshare/total_loss")),
        Panel("Validation loss, nats per token", ("eval/loss",)),
        Panel("Validation perplexity", ("eval/perplexity",)),
        Panel(
            "Terms of the teacher",
            ("postshare/distill_loss", "postshare/hidden_loss", "postshare/attention_loss"),
        ),
        Panel("Loss of the worst rank", ("postshare/lm_loss_max",)),
    ),
    "penalty": (
        Panel("Penalty", ("postshare/penalty",)),
        Panel("Gradient norm before clipping", ("train/grad_norm",)),
        Panel("Learning rate", ("train/learning_rate",)),
        Panel("Bytes that the penalty sends in a step", ("perf/penalty_bytes",)),
    ),
    "pairs": (
        Panel(
            "Distance of pairs", ("postshare/pair_distance_mean", "postshare/pair_distance_worst")
        ),
        Panel("Cosine of pairs", ("postshare/pair_cosine_mean", "postshare/pair_cosine_worst")),
        Panel("Pairs that are equal", ("postshare/pairs_merged",)),
        Panel("Distances of all pairs", ("postshare/pair_distances",)),
    ),
    "systems": (
        Panel("Tokens per second", ("perf/tokens_per_second",)),
        Panel(
            "Seconds of a step, and of them waiting for data",
            ("perf/step_seconds", "perf/data_wait_seconds", "perf/data_wait_seconds_max"),
        ),
        Panel("Peak memory, bytes", ("perf/memory_bytes", "perf/memory_bytes_max")),
        Panel("Seconds of a rank by itself", ("perf/rank_seconds_median", "perf/rank_seconds_max")),
        Panel("Slowest rank", ("perf/slowest_rank",)),
    ),
    "evaluation": (
        Panel(
            "Perplexity against bytes",
            ("postshare/bytes/compact", "postshare/perplexity/post"),
            "points",
        ),
        Panel(
            "Perplexity",
            (
                "postshare/perplexity/base",
                "postshare/perplexity/continued",
                "postshare/perplexity/direct",
                "postshare/perplexity/post",
            ),
            "bars",
        ),
        Panel(
            "Bytes of the weights",
            ("postshare/bytes/base", "postshare/bytes/compact", "postshare/bytes/dense"),
            "bars",
        ),
        Panel(
            "Units that changed (heads, KV groups), attention parameters that are no longer stored",
            (
                "postshare/heads/requested_ratio",
                "postshare/heads/effective_ratio",
                "postshare/parameters/stored_ratio",
            ),
            "bars",
        ),
        Panel(
            "Elements of the cache for each token",
            (
                "postshare/cache/base_elements_per_token",
                "postshare/cache/stored_elements_per_token",
            ),
            "bars",
        ),
    ),
}


def keys(*sections: str) -> set[str]:
    """All that the panels of these sections show."""
    return {key for name in sections for panel in SECTIONS[name] for key in panel.keys}


def evaluation_values(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of ``summary.json``, such as ``postshare/perplexity/post``; what is null is left
    out."""
    return dict(_numbers(summary, OURS))


def _numbers(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _numbers(entry, f"{prefix}{key}/")
        elif isinstance(entry, int | float):
            yield prefix + key, entry
