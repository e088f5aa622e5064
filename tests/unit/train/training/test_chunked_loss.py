"""Losses by chunks against the same from whole logits, by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sa_models.calibration import logit_chunks
from sa_models.calibration.token_losses import IGNORED
from tests.support.training import LENGTH, VOCABULARY, Setting, build, teacher_folder
from train.distributed.engines.start import start
from train.training.chunked_loss import token_sums
from train.training.distill_loss import Projection
from train.training.objective import Lessons, Objective

SIZE, WORDS = 13, 57


def given(rows: int = 22) -> tuple[Tensor, Tensor, Tensor, Projection]:
    """Hidden states, lm_head, labels of which a stretch and some others are left out, a teacher."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    labels = torch.randint(WORDS, (2, rows // 2), generator=generator)
    labels[0, 2:9] = labels[1, 0] = labels[:, -1] = IGNORED
    teacher = Projection(normal(2, rows // 2, 2 * SIZE), normal(WORDS, 2 * SIZE))
    return normal(2, rows // 2, SIZE), normal(WORDS, SIZE), labels, teacher


def whole(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Projection,
    weights: tuple[float, float],
) -> Tensor:
    """(total, entropy, divergence at temperature 2) from whole logits, by torch's own losses."""
    predicted = labels != IGNORED
    logits = F.linear(hidden, weight)[predicted]
    theirs = F.linear(teacher.hidden, teacher.weight)[predicted].to(logits.dtype)
    entropy = F.cross_entropy(logits, labels[predicted], reduction="sum")
    ours, other = (x.div(2).log_softmax(-1) for x in (logits, theirs))
    apart = 4 * F.kl_div(ours, other, log_target=True, reduction="sum")
    return torch.stack([weights[0] * entropy + weights[1] * apart, entropy, apart])


def small(monkeypatch: pytest.MonkeyPatch, rows: int, words: int = WORDS) -> None:
    monkeypatch.setattr(logit_chunks, "CHUNK_ELEMENTS", rows * words)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 10, 11, 22])
def test_sums_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, taught: bool
) -> None:
    """Also scaled from above, and where chunks do not divide the rows that are predicted."""
    small(monkeypatch, rows)
    hidden, weight, labels, teacher = given()
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    weights = (0.3, 0.7 * taught)
    asked = teacher if taught else None
    found = token_sums(*ours, labels, asked, 2.0, weights)
    expected = whole(*theirs, labels, teacher, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[: 2 + taught], expected[: 2 + taught], rtol=1e-6, atol=0)
    (found[0] / 14 * 3).backward()
    (expected[0] / 14 * 3).backward()
    for one, other in zip(ours, theirs, strict=True):
        assert apart(one.grad, other.grad) < 1e-6
    assert bool((ours[0].grad[labels == IGNORED] == 0).all())


def test_what_is_left_out_altogether_has_gradients_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not none: every rank has to reduce the same gradients."""
    small(monkeypatch, 3)
    hidden, weight, labels, _ = given()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    total = token_sums(hidden, weight, torch.full_like(labels, IGNORED))[0]
    total.backward()
    assert float(total.detach()) == 0
    for parameter in (hidden, weight):
        assert parameter.grad is not None
        assert bool((parameter.grad == 0).all())


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_near_to_the_truth_as_whole_logits_are(
    monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    small(monkeypatch, 20)
    hidden, weight, labels, teacher = given(400)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    whole(*exact, labels, teacher, (1.0, 0.0))[0].backward()
    dtype = torch.float32 if autocast else torch.bfloat16
    errors = []
    for chunked in (True, False):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if chunked:
                loss = token_sums(*inputs, labels)[0]
            else:
                logits = F.linear(*inputs).float().flatten(0, 1)
                options = {"ignore_index": IGNORED, "reduction": "sum"}
                loss = F.cross_entropy(logits, labels.flatten(), **options)
        assert loss.dtype == torch.float32
        loss.backward()
        assert [x.grad.dtype for x in inputs] == [dtype, dtype]
        errors.append([apart(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True)])
    assert all(1e-5 < one <= 1.1 * other < 2e-2 for one, other in zip(*errors, strict=True)), errors


def test_autocast_does_not_round_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 3)
    hidden, weight, labels, teacher = given()
    with torch.autocast("cpu", torch.bfloat16):
        found = token_sums(hidden, weight, labels, teacher, 2.0)[2]
    rounded = hidden.bfloat16(), weight.bfloat16()
    logits = (rounded[0] @ rounded[1].T).float()
    expected = whole(logits, torch.eye(WORDS), labels, teacher, (1.0, 0.0))[2]
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_what_is_frozen_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 3)
    hidden, weight, labels, _ = given()
    for trained in (0, 1):
        both = [x.clone().requires_grad_(at == trained) for at, x in enumerate((hidden, weight))]
        with Sizes() as sizes:
            token_sums(*both, labels)[0].backward()
        other = [x.clone().requires_grad_() for x in (hidden, weight)]
        token_sums(*other, labels)[0].backward()
        assert torch.equal(both[trained].grad, other[trained].grad)
        assert both[1 - trained].grad is None
        assert sizes.products == 2 * 4  # of 12 predicted rows, by 3
    with Sizes() as sizes, torch.no_grad():
        sums = token_sums(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert sizes.products == 4
    assert torch.equal(sums, token_sums(hidden, weight, labels).detach())


def test_gradients_are_scaled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 3)
    hidden, weight, labels, _ = given()
    total = token_sums(hidden.requires_grad_(), weight, labels)[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# --- in a model -----------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """The most rows of logits that any operation makes, and the number of matrix products."""

    rows = products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return made


def gradients(setting: Setting, batch: dict[str, Tensor]) -> tuple[list[float], dict, Sizes]:
    """Losses, the gradients of all parameters, and what a micro-batch computes on the way."""
    recipe = setting.recipe()
    engine = start(recipe)
    model, optimizer = build(setting)
    engine.prepare(model, optimizer)
    lessons = Lessons(recipe, engine, None, 0) if setting.distill else None  # type: ignore[arg-type]
    objective = Objective(engine, model, recipe, setting.lm_weight, lessons)
    with Sizes() as sizes, engine.micro_step(boundary=True):
        total, losses = objective(dict(batch))
        engine.backward(total / 100)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = {n: gradient for n, gradient in found.items() if gradient.numel()}
    engine.close()
    return [total.item(), *(loss.item() for loss in losses.values())], found, sizes


CASES = {
    "tied": Setting(model="both", checkpointing=True),
    "untied": Setting(model="spans"),
    "compact": Setting(model="owned", heal=True),
    "lora": Setting(lora=3),
    "frozen": Setting(trainable="model.layers"),
    "full": Setting(model="both", distill=(("temperature", 2.0), ("hidden_weight", 0.3))),
    "top k": Setting(model="both", distill=(("top_k", 7), ("weight", 1.0))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_learns_the_same_and_never_sees_all_logits(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    setting = CASES[case]
    if setting.distill:
        teacher_folder(setting.model)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (64, LENGTH), generator=generator)
    labels = ids.clone()
    labels[::3, :9] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
    expected, by_all, sizes = gradients(setting, batch)
    predicted = int((labels[:, 1:] != IGNORED).sum())
    assert sizes.rows >= (predicted if setting.distill else ids.numel())
    small(monkeypatch, 50, VOCABULARY)
    found, by_chunks, sizes = gradients(setting, batch)
    assert sizes.rows == 50
    assert found == pytest.approx(expected, rel=1e-6)
    assert by_chunks.keys() == by_all.keys()
    for name, gradient in by_chunks.items():
        assert apart(gradient, by_all[name]) < 1e-6, name
