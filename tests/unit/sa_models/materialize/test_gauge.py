"""Aligning heads: the function stays, and nothing comes closer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sa_models.heads import HeadLayout
from sa_models.materialize.gauge import absorbed, align_planes, align_values
from sa_models.materialize.ties import unit as unit_of
from sa_models.scores.gauge_invariant import aligned_scores
from tests.support.gauge import HEAD_DIM, change_gauge_, tiny, tokens
from tests.support.in_memory import InMemory


def parts(model, unit: tuple[int, int]) -> dict[str, torch.Tensor]:
    layout, parameters = HeadLayout.from_config(model.config), dict(model.named_parameters())
    return {p: unit_of(parameters, layout, p, *unit).detach() for p in "qkvo"}


def align_(model, target: tuple[int, int], source: dict[str, torch.Tensor]) -> None:
    mine = parts(model, target)
    planes = align_planes((source["q"], source["k"]), (mine["q"], mine["k"]), HEAD_DIM)
    values = align_values((source["v"], source["o"]), (mine["v"], mine["o"]))
    for p in "qkvo":
        mine[p].copy_((planes if p in "qk" else values).apply(p, mine[p].clone()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_aligning_keeps_the_logits(kv_heads: int) -> None:
    model, ids = tiny(kv_heads), tokens()
    before = model(ids).logits
    change_gauge_(model)  # far from balanced
    for layer, unit in itertools.product((1, 2), range(kv_heads)):
        align_(model, (layer, unit), parts(model, (0, 0)))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_head_in_another_gauge_is_found_again(kv_heads: int) -> None:
    model, other = tiny(kv_heads), tiny(kv_heads)
    change_gauge_(other)
    source = parts(model, (1, 0))
    assert (parts(other, (1, 0))["v"] - source["v"]).norm() > 0.5 * source["v"].norm()
    align_(other, (1, 0), source)
    for p, slice_ in parts(other, (1, 0)).items():
        torch.testing.assert_close(slice_, source[p], rtol=0, atol=2e-5)


def test_the_cosine_after_alignment_is_the_score() -> None:
    """With the source in the balanced gauge, closed form and aligned weights must agree."""
    model = tiny(2)
    source = parts(model, (0, 1))
    half = HEAD_DIM // 2
    for i in range(half):
        q_rows = [h * HEAD_DIM + i + at for h in range(2) for at in (0, half)]
        k_rows = [i, i + half]
        r = (source["k"][k_rows].norm() / source["q"][q_rows].norm()).sqrt()
        source["q"][q_rows] *= r
        source["k"][k_rows] /= r
    align_(model, (2, 1), source)
    mine = parts(model, (2, 1))
    x, y = (torch.cat([u["q"], u["k"]]).double() for u in (mine, source))
    cosine = float((x * y).sum() / x.norm() / y.norm())
    layout = HeadLayout.from_config(model.config)
    scores = aligned_scores(InMemory(dict(model.named_parameters())), layout, "qk_aligned")
    assert cosine == pytest.approx(float(scores[5, 1]), abs=2e-6)


def test_no_rotation_of_values_comes_closer() -> None:
    """Brute force over rotations of two dimensions, with heads that are balanced already."""
    generator = torch.Generator().manual_seed(4)

    def balanced() -> tuple[torch.Tensor, torch.Tensor]:
        v, _ = torch.linalg.qr(torch.randn(9, 2, generator=generator).double())
        o, _ = torch.linalg.qr(torch.randn(9, 2, generator=generator).double())
        return v.T, o.T

    source, target = balanced(), balanced()

    def distance(m: torch.Tensor) -> float:
        o = torch.linalg.inv(m).T @ target[1]
        return float((source[0] - m @ target[0]).square().sum() + (source[1] - o).square().sum())

    found = align_values(source, target)
    assert distance(found.m) == pytest.approx(
        float((source[0] - found.apply("v", target[0])).square().sum())
        + float((source[1] - found.apply("o", target[1])).square().sum())
    )
    turns = [angle * math.pi / 5000 for angle in range(10000)]
    grid = [
        distance(
            torch.tensor([[math.cos(t), -s * math.sin(t)], [math.sin(t), s * math.cos(t)]]).double()
        )
        for t, s in itertools.product(turns[::10], (1.0, -1.0))
    ]
    assert distance(found.m) <= min(grid) + 1e-9
    assert distance(found.m) == pytest.approx(min(grid), abs=1e-4)
    torch.testing.assert_close(found.m @ found.inverse, torch.eye(2).double())


def test_the_absorbing_o_is_the_closest() -> None:
    """Gradient descent on every entry of o ends where the closed form is."""
    source, target = parts(tiny(2), (0, 1)), parts(tiny(2), (2, 0))
    v, o, new = (x.double() for x in (target["v"], target["o"], source["v"]))
    found = absorbed(v, o, new)

    def distance(x: torch.Tensor) -> torch.Tensor:
        heads = zip(x.split(HEAD_DIM), o.split(HEAD_DIM), strict=True)
        return sum((mine.T @ new - theirs.T @ v).square().sum() for mine, theirs in heads)

    free = found.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(free), free)
    assert float(gradient.norm()) < 1e-10 * float(distance(o * 0))
    assert float(distance(found)) < float(distance(o * 0)) < float(distance(o))
    torch.testing.assert_close(absorbed(v, o, v), o)


def test_zero_weights() -> None:
    unit = parts(tiny(2), (0, 1))
    zero = torch.zeros_like(unit["v"])
    for source, target in (
        ((unit["v"], unit["o"]), (zero, unit["o"])),
        ((unit["v"], torch.zeros_like(unit["o"])), (unit["v"], unit["o"])),
    ):
        kept = align_values(source, target)
        assert torch.equal(kept.apply("v", target[0]), target[0].double())
        assert torch.equal(kept.apply("o", target[1]), target[1].double())
    q = unit["q"].clone()
    q[[1, 1 + HEAD_DIM // 2, 1 + HEAD_DIM, 1 + HEAD_DIM + HEAD_DIM // 2]] = 0
    found = align_planes((unit["q"], unit["k"]), (q, unit["k"]), HEAD_DIM)
    assert complex(found.q[1]) == complex(found.k[1]) == 1
