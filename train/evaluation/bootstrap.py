"""Confidence intervals of losses, and of how far apart two losses are.

An interval has two sources: the held-out text (a few blocks stand for all text) and the seed. Both
are drawn again, with replacement, `DRAWS` times; what is compared shares blocks and seeds, so that
a difference is judged by its own spread and not by that of each side (a paired bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.evaluation.perplexity import BlockLosses

DRAWS = 2000
LEVEL = 0.95

Interval = tuple[float, float]
Runs = Sequence[BlockLosses]
"""A model's losses with each seed, on the same blocks; one entry where no seed enters."""


def mean_loss(runs: Runs) -> float:
    """Nats per token, the mean over the seeds."""
    return sum(run.perplexity.loss for run in runs) / len(runs)


def interval(runs: Runs, reference: Runs | None = None, seed: int = 0) -> Interval:
    """Of the loss (nats per token), or of how far it lies above that of a reference.

    Args:
        reference: on the same blocks; its seed k is paired with seed k of `runs`.
        seed: of the bootstrap.

    Returns:
        the 2.5 and the 97.5 percent quantiles.
    """
    others = [runs, reference] if reference else [runs]
    signs = [1.0, -1.0]
    seeds = max(map(len, others))
    generator = np.random.default_rng(seed)
    tokens = np.array(runs[0].tokens, dtype=np.float64)
    drawn = generator.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), DRAWS)
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    value = np.zeros(DRAWS)
    for one, sign in zip(others, signs, strict=False):
        nats = np.array([losses.nats for losses in one])  # (seeds, blocks)
        mean = (drawn @ nats.T) / (drawn @ tokens)[:, None]  # (draws, seeds)
        weights = drawn_seeds if len(one) == seeds else np.ones((DRAWS, 1))
        value += sign * (mean * weights).sum(axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(value, [tail, 1 - tail])
    return float(low), float(high)
