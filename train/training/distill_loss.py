"""Distillation losses: a student's output against its teacher's, sums over predicted positions.

With T the temperature, p = softmax(teacher's logits / T) and q = softmax(student's logits / T), the
divergence of a position is

    full    T^2 * KL(p || q) = T^2 * sum over all tokens v of p_v (log p_v - log q_v)
    top k   T^2 * [ sum over v in S of p_v (log p_v - log q_v) + p_R (log p_R - log q_R) ]

S are the k likeliest tokens of the teacher, p_R and q_R what either gives to all other tokens
together: the divergence of two distributions over k + 1 outcomes, so never negative, and 0 exactly
where q agrees with p on each of them. T^2 keeps the size of the gradient (Hinton, Vinyals, Dean,
arXiv 1503.02531, section 2).

Everything is computed in fp32, some rows at a time (:mod:`train.training.chunked_loss`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_models.calibration.logit_chunks import chunks

EPSILON = 1e-6
"""Added to the teacher's mean square, so that a silent block is no division by zero."""


@dataclass(frozen=True)
class Projection:
    """Logits that are computed when they are asked for.

    Attributes:
        hidden: [..., hidden size], what lm_head is given.
        weight: [vocabulary, hidden size], its own, in the same dtype.
    """

    hidden: Tensor
    weight: Tensor

    def rows(self, at: Tensor | slice) -> Projection:
        """Some of all positions in a row: [rows, hidden size]."""
        return Projection(self.hidden.flatten(0, -2)[at], self.weight)

    def logits(self) -> Tensor:
        """fp32 [..., vocabulary], rounded to the dtype of both on the way."""
        return (self.hidden @ self.weight.T).float()


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

    def rows(self, at: Tensor | slice) -> TopK:
        """Some of all positions in a row: [rows, k]."""
        flat = self.ids.flatten(0, -2), self.log_probabilities.flatten(0, -2), self.rest.flatten()
        return TopK(*(part[at] for part in flat))


@torch.no_grad()
def likeliest(teacher: Projection, k: int, temperature: float) -> TopK:
    """The teacher's side of the top-k divergence.

    Args:
        k: below the vocabulary's size.
    """
    shape, parts = teacher.hidden.shape[:-1], []
    for at in chunks(shape.numel(), len(teacher.weight), teacher.weight.device.type):
        scaled = teacher.rows(at).logits() / temperature
        whole = scaled.logsumexp(-1)
        values, ids = scaled.topk(k, dim=-1)
        others = scaled.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        parts.append((ids.int(), values - whole[:, None], others - whole))
    ids, values, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopK(ids.view(*shape, k), values.view(*shape, k), rest.view(shape))


def divergence(
    student: Tensor, teacher: Projection | TopK, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL of each row and its gradient by the student's softened logits; neither has T^2 yet.

    Args:
        student: fp32 [rows, vocabulary], logits divided by the temperature.
        teacher: of the same rows.

    Returns:
        fp32 [rows] and [rows, vocabulary].
    """
    if isinstance(teacher, TopK):
        ids = teacher.ids.long()
        whole = student.logsumexp(-1, keepdim=True)
        own = student.gather(-1, ids) - whole
        gradient = (student - whole).exp_()
        others = student.scatter(-1, ids, -torch.inf)
        rest = others.logsumexp(-1) - whole.squeeze(-1)
        known = teacher.log_probabilities.exp()
        total = (known * (teacher.log_probabilities - own)).sum(-1)
        total += teacher.rest.exp() * (teacher.rest - rest)
        # Among the others the teacher takes no side: its share is theirs as the student has it.
        gradient -= others.softmax(-1).mul_(teacher.rest.exp()[:, None])
        return total, gradient.scatter_add_(-1, ids, -known)
    expected, own = (teacher.logits() / temperature).log_softmax(-1), student.log_softmax(-1)
    likely = expected.exp()
    total = expected.sub_(own).mul_(likely).sum(-1)
    return total, own.exp_().sub_(likely)


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
