"""The sums and their gradients against a plain loop in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sa_models.calibration import logit_chunks
from sa_models.calibration.token_losses import IGNORED
from train.training.chunked_loss import token_sums
from train.training.distill_loss import Projection, TopK, feature_sum, likeliest

ROWS, LENGTH, VOCABULARY = 2, 5, 23


def same(vocabulary: int = VOCABULARY) -> torch.Tensor:
    """An lm_head whose logits are what it is given."""
    return torch.eye(vocabulary)


def answer(logits: torch.Tensor, k: int | None, temperature: float) -> Projection | TopK:
    """What a teacher of these logits says."""
    whole = Projection(logits, same(logits.shape[-1]).to(logits.dtype))
    return whole if k is None else likeliest(whole, k, temperature)


def given(seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits, and labels of which some are left out."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, LENGTH, VOCABULARY)
    student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, 1] = labels[1, 4] = labels[1, 0] = IGNORED
    return student, teacher, labels


def plain(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    k: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums position by position, token by token; differentiable by autograd."""
    entropy = divergence = torch.zeros((), dtype=torch.float64)
    for row, expected, label in zip(
        student.double().view(-1, VOCABULARY),
        teacher.double().view(-1, VOCABULARY),
        labels.flatten().tolist(),
        strict=True,
    ):
        if label == IGNORED:
            continue
        entropy = entropy - torch.log(torch.exp(row[label]) / torch.exp(row).sum())
        q = torch.exp(row / temperature) / torch.exp(row / temperature).sum()
        p = torch.exp(expected / temperature) / torch.exp(expected / temperature).sum()
        if k is not None:
            chosen = sorted(range(VOCABULARY), key=lambda v: -float(p[v]))[:k]
            others = [v for v in range(VOCABULARY) if v not in chosen]
            p = torch.stack([*(p[v] for v in chosen), p[others].sum()])
            q = torch.stack([*(q[v] for v in chosen), q[others].sum()])
        for one, other in zip(p, q, strict=True):
            divergence = divergence + temperature**2 * one * torch.log(one / other)
    return entropy, divergence


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 10**6])
@pytest.mark.parametrize("k", [None, 1, 6, VOCABULARY - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sums_and_gradient_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, temperature: float, k: int | None, chunk: int
) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_ELEMENTS", chunk)
    student, teacher, labels = given()
    ours, reference = (student.clone().requires_grad_() for _ in range(2))
    asked = answer(teacher, k, temperature)
    found = token_sums(ours, same(), labels, asked, temperature, (0.3, 0.7))
    expected = plain(reference, teacher, labels, temperature, k)
    for one, other in zip(found[1:], expected, strict=True):
        assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-5)
    found[0].backward()
    (0.3 * expected[0] + 0.7 * expected[1]).backward()
    assert float(reference.grad.abs().max()) > 0.1
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=2e-6)
    assert bool((ours.grad[labels == IGNORED] == 0).all())


def test_bf16_logits_keep_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = given()
    ours = student.bfloat16().requires_grad_()
    reference = ours.detach().float().requires_grad_()
    asked = answer(teacher.bfloat16(), None, 2.0)
    token_sums(ours, same().bfloat16(), labels, asked, 2.0, (0.0, 1.0))[0].backward()
    plain(reference, teacher.bfloat16(), labels, 2.0, None)[1].backward()
    assert ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad, reference.grad.bfloat16(), rtol=1e-2, atol=1e-5)


def test_a_student_that_equals_its_teacher_learns_nothing_from_it() -> None:
    student, _, labels = given()
    for k, bound in ((None, 0.0), (5, 1e-6)):
        ours = student.clone().requires_grad_()
        found = token_sums(ours, same(), labels, answer(student, k, 1.5), 1.5, (0.0, 1.0))[0]
        found.backward()
        assert abs(float(found.detach())) <= 1e-5 * bool(bound)
        assert float(ours.grad.abs().max()) <= bound


def test_the_bucket_makes_it_a_divergence() -> None:
    """Never negative, at most the full one, and what is not the teacher's favourite matters too."""
    for seed in range(20):
        student, teacher, labels = given(seed, scale=1.0)
        full, *parts = (
            float(token_sums(student, same(), labels, answer(teacher, k, 1.0))[2])
            for k in (None, 1, 4, 12, 22)
        )
        assert parts[0] >= 0
        assert parts == sorted(parts)  # a finer partition sees more
        assert parts[-1] == pytest.approx(full, rel=1e-4)
    # Tokens of the teacher in the right proportion, but with all too little probability.
    teacher = torch.zeros(1, 1, 8)
    teacher[..., :2] = 5.0
    student = torch.zeros(1, 1, 8)
    top = answer(teacher, 2, 1.0)
    assert float(token_sums(student, same(8), torch.zeros(1, 1).long(), top)[2]) > 0.5


def test_what_the_teacher_leaves_is_kept_where_it_is_tiny() -> None:
    teacher = torch.zeros(1, 8)
    teacher[0, 3] = 60.0  # all others together: 7 exp(-60), which 1 - p could not tell from 0
    top = answer(teacher, 1, 1.0)
    assert isinstance(top, TopK)
    assert top.ids.tolist() == [[3]]
    assert float(top.rest) == pytest.approx(math.log(7) - 60, abs=1e-4)


def test_features_are_compared_position_by_position() -> None:
    generator = torch.Generator().manual_seed(3)
    layers = [
        [torch.randn(ROWS, LENGTH, 7, generator=generator) for _ in range(3)] for _ in range(2)
    ]
    layers[1][2][0, 2] = 0.0  # a silent block
    ours = [layer.clone().requires_grad_() for layer in layers[0]]
    _, _, labels = given()
    reference = [layer.double().requires_grad_() for layer in layers[0]]
    total = torch.zeros((), dtype=torch.float64)
    for own, expected in zip(reference, layers[1], strict=True):
        for row in range(ROWS):
            for at in range(LENGTH):
                if labels[row, at] == IGNORED:
                    continue
                error = sum((own[row, at, i] - float(expected[row, at, i])) ** 2 for i in range(7))
                size = sum(float(expected[row, at, i]) ** 2 for i in range(7))
                total = total + (error / 7) / (size / 7 + 1e-6) / 3
    found = feature_sum(ours, layers[1], labels != IGNORED)
    assert float(found.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    found.backward()
    total.backward()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
