"""Distillation losses: a student's output against its teacher's, sums over predicted positions.

With T the temperature, p = softmax(teacher's logits / T) and q = softmax(student's logits / T), the
divergence of a position is

    full    T^2 * KL(p || q) = T^2 * sum over all tokens v of p_v (log p_v - log q_v)
    top k   T^2 * [ sum over v in S of p_v (log p_v - log q_v) + p_R (log p_R - log q_R) ]

S are the k likeliest tokens of the teacher, p_R and q_R what either gives to all other tokens
together: the divergence of two distributions over k + 1 outcomes, so never negative, and 0 exactly
where q agrees with p on each of them. T^2 keeps the size of the gradient (Hinton, Vinyals, Dean,
arXiv 1503.02531, section 2).

Everything is computed in fp32, some rows at a time: no copy of all logits in fp32 is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_models.calibration.token_losses import IGNORED

CHUNK_ELEMENTS = 2**24
"""Logits that are in fp32 at a time: 64 MiB, and a few temporaries of that size."""
EPSILON = 1e-6
"""Added to the teacher's mean square, so that a silent block is no division by zero."""


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution at a temperature: its k likeliest tokens, and the others as one.

    Attributes:
        ids: int [..., k], in no particular order of tokens.
        log_probabilities: fp32 [..., k].
        rest: fp32 [...], the log-probability of all other tokens together.
    """

    ids: Tensor
    log_probabilities: Tensor
    rest: Tensor

    def flat(self) -> TopK:
        """With all leading dimensions as one."""
        k = self.ids.shape[-1]
        return TopK(
            self.ids.reshape(-1, k), self.log_probabilities.reshape(-1, k), self.rest.reshape(-1)
        )


def chunks(logits: Tensor) -> Iterator[slice]:
    """Rows of [rows, vocabulary] logits that are worked on at a time."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


@torch.no_grad()
def likeliest(logits: Tensor, k: int, temperature: float) -> TopK:
    """The teacher's side of the top-k divergence.

    Args:
        logits: [..., vocabulary], in any float dtype; k is below the vocabulary's size.
    """
    flat, parts = logits.flatten(0, -2), []
    for at in chunks(flat):
        scaled = flat[at].float() / temperature
        whole = scaled.logsumexp(-1)
        values, ids = scaled.topk(k, dim=-1)
        others = scaled.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        parts.append((ids.int(), values - whole[:, None], others - whole))
    ids, values, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = logits.shape[:-1]
    return TopK(ids.view(*shape, k), values.view(*shape, k), rest.view(shape))


def token_sums(
    logits: Tensor, labels: Tensor, teacher: Tensor | TopK, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the labels and divergence from the teacher, in nats; differentiable.

    Args:
        logits: [..., vocabulary], the student's, in any float dtype.
        labels: int64 [...]; IGNORED positions count in neither.
        teacher: logits as the student's, or what :func:`likeliest` makes of them.

    Returns:
        two fp32 scalars, sums over the predicted positions.
    """
    flat = teacher.flat() if isinstance(teacher, TopK) else teacher.flatten(0, -2)
    return TokenSums.apply(logits.flatten(0, -2), labels.flatten(), flat, temperature)


class TokenSums(torch.autograd.Function):
    """Both sums in closed form: their gradients are computed anew, and only when they are needed.

    Kept for the backward are the logits as the model made them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor | TopK, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, labels)
        ctx.teacher, ctx.temperature = teacher, temperature
        sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
        for at in chunks(logits):
            student, target = logits[at].float(), labels[at]
            predicted = target != IGNORED
            index = target.clamp(min=0)[:, None]
            entropy = student.logsumexp(-1) - student.gather(-1, index).squeeze(-1)
            divergence = _divergence(student / temperature, _at(teacher, at), temperature)
            both = torch.stack([entropy, divergence])
            sums += torch.where(predicted, both, 0.0).sum(-1, dtype=torch.float64)
        sums[1] *= temperature**2
        entropy, divergence = sums.float()
        return entropy.clone(), divergence.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Any) -> tuple[Tensor, None, None, None]:
        logits, labels = ctx.saved_tensors
        entropy, divergence = factors
        temperature = ctx.temperature
        gradient = torch.empty_like(logits)
        for at in chunks(logits):
            student, target = logits[at].float(), labels[at]
            index = target.clamp(min=0)[:, None]
            cross = student.softmax(-1)
            cross.scatter_add_(-1, index, torch.full_like(index, -1, dtype=cross.dtype))
            # d(T^2 KL)/d(logit) is T times what it is by the softened logit.
            soft = _gradient(student.div_(temperature), _at(ctx.teacher, at), temperature)
            both = cross.mul_(entropy).add_(soft.mul_(temperature * divergence))
            gradient[at] = both.masked_fill_((target == IGNORED)[:, None], 0.0)
        return gradient, None, None, None


def _at(teacher: Tensor | TopK, rows: slice) -> Tensor | TopK:
    if isinstance(teacher, TopK):
        return TopK(teacher.ids[rows].long(), teacher.log_probabilities[rows], teacher.rest[rows])
    return teacher[rows].float()


def _divergence(student: Tensor, teacher: Tensor | TopK, temperature: float) -> Tensor:
    """KL of each row; `student` is divided by the temperature already."""
    if isinstance(teacher, TopK):
        whole = student.logsumexp(-1)
        own = student.gather(-1, teacher.ids) - whole[:, None]
        others = student.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1) - whole
        known = teacher.log_probabilities.exp() * (teacher.log_probabilities - own)
        return known.sum(-1) + teacher.rest.exp() * (teacher.rest - others)
    expected = (teacher / temperature).log_softmax(-1)
    return (expected.exp() * (expected - student.log_softmax(-1))).sum(-1)


def _gradient(student: Tensor, teacher: Tensor | TopK, temperature: float) -> Tensor:
    """d(KL)/d(student) of each row."""
    if isinstance(teacher, TopK):
        others = student.scatter(-1, teacher.ids, -torch.inf)
        found = (student - student.logsumexp(-1, keepdim=True)).exp()
        # Among the others the teacher takes no side: its share is theirs as the student has it.
        found -= others.softmax(-1).mul_(teacher.rest.exp()[:, None])
        return found.scatter_add_(-1, teacher.ids, -teacher.log_probabilities.exp())
    return student.softmax(-1) - (teacher / temperature).softmax(-1)


def feature_sum(ours: Sequence[Tensor], theirs: Sequence[Tensor], predicted: Tensor) -> Tensor:
    """Squared error of layers' outputs, relative to the teacher's size at that very position.

    The sum over predicted positions of the mean over layers of

        mean((student - teacher)^2) / (mean(teacher^2) + 1e-6),

    the means being over the features of one position of one layer: so that the sum does not depend
    on how positions are divided into batches, and a few large positions do not drown the others.

    Args:
        ours, theirs: [batch, length, features] of each layer, in any float dtype.
        predicted: bool [batch, length].

    Returns:
        an fp32 scalar.
    """
    total = torch.zeros((), device=predicted.device)
    for own, expected in zip(ours, theirs, strict=True):
        expected = expected.float()
        size = expected.square().mean(-1) + EPSILON
        error = (own.float() - expected).square().mean(-1) / size
        total = total + torch.where(predicted, error, 0.0).sum()
    return total / len(ours)
