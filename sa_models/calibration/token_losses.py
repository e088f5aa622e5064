"""Losses of tokens, in nats: one definition for calibration, search and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sa_models.calibration.logit_chunks import chunk_elements, chunks, in_place_of

IGNORED = -100
"""Label of a token that is not predicted: the one that transformers' losses leave out."""


def row_losses(model: nn.Module, targets: Tensor, **inputs: Any) -> list[float]:
    """For every row, the sum of the nats of its predicted tokens, by a forward of the model.

    Losses are computed in fp32 whatever the dtype of the logits, and summed in float64. Logits of
    more than a chunk never exist together (:mod:`sa_models.calibration.logit_chunks`).

    Args:
        model: a language model of transformers, or what an engine or an adapter made of one.
        targets: int64 (rows, length), the token that each position predicts, or `IGNORED`. The
            model may have more positions than `length`; what they predict is not asked for.
        inputs: of the model, without labels and without a cache.
    """
    language_model = next(
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None
    )
    head: nn.Module = language_model.get_output_embeddings()
    logits, words = head.forward, language_model.config.vocab_size
    with in_place_of(head, lambda hidden: head_losses(logits, words, hidden, targets)):
        return model(**inputs, use_cache=False).logits.tolist()


def head_losses(
    head: Callable[[Tensor], Tensor], words: int, hidden: Tensor, targets: Tensor
) -> Tensor:
    """float64 (rows,): as :func:`row_losses`, from what enters lm_head.

    Args:
        head: lm_head, or its forward: (..., hidden size) to (..., words).
        hidden: (rows, at least length, hidden size).
    """
    if hidden[..., 0].numel() * words <= chunk_elements(hidden.device.type):
        sums = [_sum(row, target) for row, target in zip(head(hidden), targets, strict=True)]
    else:
        sums = []
        for row, target in zip(hidden, targets, strict=True):
            parts = chunks(len(target), words, hidden.device.type)
            sums.append(torch.stack([_sum(head(row[at]), target[at]) for at in parts]).sum())
    return torch.stack(sums)


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    """float64 scalar: of (at least length, words) logits, one fp32 copy of which is made.

    `cross_entropy` is not exact enough here: torch's fp32 log_softmax on a CPU adds up the words so
    that what is small beside the sum is lost. Losses of SmolLM2-135M (49,152 words) come out 1.7e-5
    nats too low, and by another amount on another processor; `logsumexp` is within 4e-8.
    """
    logits = logits[: len(targets)].float()
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    losses = logits.logsumexp(-1).double() - chosen.double()
    return losses.where(targets != IGNORED, 0.0).sum()
