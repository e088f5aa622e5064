"""The names in wandb of the columns of metrics.jsonl: those of other trainers, where they exist.

transformers and TRL log `train/loss`, `train/grad_norm` and so on: curves of theirs and ours then
lie in one chart. What only this project measures is `postshare/*`, what a step costs `perf/*`.
"""

from __future__ import annotations

NAMES = {
    "step": "train/global_step",
    "tokens": "train/num_tokens",
    "lm_loss": "train/loss",
    "gradient_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "validation_loss": "eval/loss",
    "validation_perplexity": "eval/perplexity",
}
PERFORMANCE = {
    "seconds",
    "step_seconds",
    "tokens_per_second",
    "data_wait_seconds",
    "data_wait_seconds_max",
    "memory_bytes",
    "memory_bytes_max",
    "rank_seconds_max",
    "rank_seconds_median",
    "slowest_rank",
    "penalty_bytes",
}
OURS = "postshare/"
"""Before every other name, and before the numbers of ``summary.json``."""


def wandb_name(column: str) -> str:
    """The name in wandb of a column of metrics.jsonl."""
    if column in PERFORMANCE:
        return f"perf/{column}"
    return NAMES.get(column, f"{OURS}{column}")
