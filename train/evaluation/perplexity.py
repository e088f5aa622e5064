"""Perplexity on held-out blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sa_models.calibration.token_losses import IGNORED, row_losses
from sa_models.errors import PostshareError
from train.common.progress import bar
from train.data.blocks import Block, Blocks
from train.data.reader import read_batches


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood in nats per token, its exponential, and the tokens predicted."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class BlockLosses:
    """What each block contributes: sums of token losses in nats, and the tokens predicted."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def perplexity(self) -> Perplexity:
        """Token-weighted over the blocks. Raises PostshareError as :func:`block_losses`."""
        tokens = sum(self.tokens)
        if tokens == 0:
            raise PostshareError("no token to evaluate; add text to data.validation")
        loss = sum(self.nats) / tokens
        if not math.isfinite(loss):
            raise PostshareError(
                f"the evaluation loss is {loss}; of a trained model look for the step where it "
                "first appears in metrics.jsonl and lower train.learning_rate, of another one "
                "check the weights"
            )
        return Perplexity(loss=loss, perplexity=math.exp(loss), tokens=tokens)


def perplexity(
    model: torch.nn.Module,
    blocks: Blocks,
    batch_size: int,
    limit: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Token-weighted perplexity over the blocks; see :func:`block_losses`."""
    return block_losses(model, blocks, batch_size, limit, progress).perplexity


@torch.no_grad()
def block_losses(
    model: torch.nn.Module,
    blocks: Blocks | Sequence[Block],
    batch_size: int,
    limit: int | None = None,
    progress: bool = True,
    name: str = "",
) -> BlockLosses:
    """Losses of the first `limit` blocks (None = all), in order, without dropout.

    `name` is the model's, for the bar.

    Every token but the first of a block is predicted; with document masks, the first of each
    document is not. Losses are computed in fp32 whatever the model's dtype, and summed in float64,
    so the result does not depend on `batch_size` beyond rounding inside the model. The model's
    training mode is restored. Nothing to predict, or a loss that is not finite, is an error
    of :attr:`BlockLosses.perplexity`.
    """
    count = len(blocks) if limit is None else min(limit, len(blocks))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats: list[float] = []
    tokens: list[int] = []
    try:
        batches = read_batches(blocks, range(count), batch_size, device)
        with bar(f"evaluating {name}".rstrip(), shown=progress) as show:
            for batch in batches:
                labels = batch.pop("labels")[:, 1:]
                nats += row_losses(model, labels, **batch)
                tokens += (labels != IGNORED).sum(1).tolist()
                show(len(nats), count)
    finally:
        model.train(was_training)
    return BlockLosses(tuple(nats), tuple(tokens))
