"""Losses of tokens, in nats: one definition for calibration, search and evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100
"""Label of a token that is not predicted: the one that transformers' losses leave out."""


def row_losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """For every row, the sum of the nats of its predicted tokens.

    Losses are computed in fp32 whatever the dtype of the logits, and summed in float64.

    Args:
        logits: (rows, length, vocabulary).
        targets: int64 (rows, length), the token that each position predicts, or `IGNORED`.
    """
    sums = []
    for row, target in zip(logits, targets, strict=True):  # one fp32 copy of a row at a time
        nll = F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
        sums.append(nll.double().sum())
    return torch.stack(sums).tolist() if sums else []  # one wait for a GPU, not one for each row
