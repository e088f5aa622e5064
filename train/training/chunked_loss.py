"""Losses of tokens from hidden states and lm_head, some rows at a time: all logits never exist.

The forward computes what the backward will want: of each chunk of rows its logits, the losses,
their gradient by the logits, and from that its part of the gradients by hidden states and weight.
The backward only scales these two. So there are three products with the weight, as without chunks
(a backward that computed the logits again would add a fourth). Chunks of the weight's gradient are
added up in fp32.

lm_head's own forward is where this happens: the call goes through the engine, which has the weight
gathered there, once for all chunks, tied to the embeddings or not, and reduces its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sa_models.calibration.logit_chunks import chunk_elements, chunks
from sa_models.calibration.token_losses import IGNORED
from train.training.distill_loss import Projection, TopK, divergence


def token_sums(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Projection | TopK | None = None,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """Cross-entropy with the labels and divergence from the teacher, in nats.

    Under autocast logits are rounded to its dtype, else to that of `hidden`.

    Args:
        hidden: [..., hidden size], what lm_head is given, in any float dtype.
        weight: [vocabulary, hidden size], of lm_head, which has no bias.
        labels: int64 [...]; IGNORED positions count in neither. On the CPU nobody waits for a GPU.
        teacher: of the same positions; without one the divergence is 0.
        weights: of the two in their sum.

    Returns:
        fp32 [3], sums over the predicted positions: the weighted sum, which alone has a gradient,
        the cross-entropy, the divergence.
    """
    kind, dtype = hidden.device.type, hidden.dtype
    if teacher is None and labels.numel() * len(weight) <= chunk_elements(kind):
        # One chunk: little would be saved, and autograd's numbers stay what they were, to the bit.
        logits, targets = F.linear(hidden, weight), labels.to(hidden.device, non_blocking=True)
        entropy = F.cross_entropy(
            logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return torch.stack([weights[0] * entropy, entropy.detach(), entropy.new_zeros(())])
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    labels = labels.flatten()
    rows = (labels != IGNORED).nonzero().squeeze(-1)
    targets = labels[rows].to(hidden.device, non_blocking=True)
    rows = rows.to(hidden.device, non_blocking=True)
    with torch.autocast(kind, enabled=False):
        return TokenSums.apply(
            hidden.flatten(0, -2), weight, rows, targets, teacher, temperature, weights, dtype
        ).float()


class TokenSums(torch.autograd.Function):
    """See :func:`token_sums`; float64 sums. A second backward of one forward is an error."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        teacher: Projection | TopK | None,
        temperature: float,
        weights: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        by_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight, dtype=torch.float32)
        table = weight.to(dtype)
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        for at in chunks(len(rows), len(weight), weight.device.type):
            own = hidden[rows[at]].to(dtype)
            asked = None if teacher is None else teacher.rows(rows[at])
            logits = Projection(own, table).logits()
            entropy, apart, gradient = _losses(logits, targets[at], asked, temperature, weights)
            del logits
            sums[1] += entropy.sum(dtype=torch.float64)
            sums[2] += apart.sum(dtype=torch.float64)
            gradient = gradient.to(dtype)
            if by_hidden is not None:
                by_hidden[rows[at]] = (gradient @ table).to(by_hidden.dtype)
            if by_weight is not None and dtype == torch.float32:
                by_weight.addmm_(gradient.T, own)
            elif by_weight is not None:
                by_weight += gradient.T @ own
        sums[0] = weights[0] * sums[1] + weights[1] * sums[2]
        if by_weight is not None:
            by_weight = by_weight.to(weight.dtype)
        ctx.save_for_backward(by_hidden, by_weight)
        return sums

    @staticmethod
    def backward(ctx: Any, *factors: Any) -> tuple[Tensor | None, ...]:
        # In place: autograd notices when they are scaled twice.
        by_hidden, by_weight = (
            None if gradient is None else gradient.mul_(factors[0][0].to(gradient.dtype))
            for gradient in ctx.saved_tensors
        )
        return by_hidden, by_weight, *(None,) * 6


def _losses(
    logits: Tensor,
    targets: Tensor,
    teacher: Projection | TopK | None,
    temperature: float,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses of each row, and the gradient of their weighted sum by the logits.

    Args:
        logits: fp32 [rows, vocabulary]; overwritten.
    """
    index = targets[:, None]
    likely = logits.log_softmax(-1)
    entropy = -likely.gather(-1, index).squeeze(-1)
    gradient = likely.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=likely.dtype))
    if teacher is None:
        return entropy, entropy.new_zeros(()), gradient.mul_(weights[0])
    apart, soft = divergence(logits.div_(temperature), teacher, temperature)
    # d(T^2 KL)/d(logit) is T times what it is by the softened logit.
    gradient.mul_(weights[0]).add_(soft, alpha=weights[1] * temperature)
    return entropy, apart * temperature**2, gradient
