"""Slopes of changes: against the estimates of units, and against differences of measured losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from sa_models import AttentionSpan, SharingPlan
from sa_models.errors import PostshareError
from sa_models.scores.fisher import estimate_sensitivity
from sa_models.scores.slope import Change, slopes
from sa_models.search.actions import Action
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.weights.structure import convert
from tests.support.reference import LAYERS, VOCABULARY, dense

EVERY = frozenset(range(LAYERS))


def batches(rows: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCABULARY, (rows, 9), generator=generator)}]


@pytest.mark.parametrize("shape", ["mha", "gqa", "odd"])
@pytest.mark.parametrize("spans", [(), (AttentionSpan(1, (2,)),)])
def test_of_units_it_is_the_sum_of_their_first_orders(
    shape: str, spans: tuple[AttentionSpan, ...]
) -> None:
    model = convert(dense(shape), SharingPlan(spans=spans)).eval()
    shares = [("q", "k"), ("v", "o")]
    found = estimate_sensitivity(model, batches(), shares, without=(2,) if spans else ())
    measured = MeasuredLoss(model, batches())
    before = {name: p.clone() for name, p in model.named_parameters()}

    def original() -> LlamaForCausalLM:
        measured.restore()
        return model

    tie, again = Action((4, 1), (0, 2), shares[0]), Action((5, 0), (3, 1), shares[1])
    gone = Action((3, 0))
    states = [frozenset(s) for s in ([tie], [again], [gone], [tie, again, gone], [])]
    changes = [
        Change(lambda s=s: measured.at(s), frozenset(a.target[0] for a in s)) for s in states
    ]
    first = [
        float(found.ties[shares[0]].first[4, 1, 0, 2]),
        float(found.ties[shares[1]].first[5, 0, 3, 1]),
        float(found.removal.first[3, 0]),
    ]
    expected = [*first, sum(first), 0.0]
    assert slopes(original, changes, batches()) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    everywhere = [replace(change, layers=EVERY) for change in changes]
    assert slopes(original, everywhere, batches()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    measured.restore()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


SA = SharingPlan(spans=(AttentionSpan(2, (3, 4)),))
CLA = SharingPlan(spans=(AttentionSpan(1, (2, 3), "kv"),))
POOLED = SharingPlan(kv_heads=1)


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        *((shape, plan) for shape in ("gqa", "odd") for plan in (SA, CLA, POOLED)),
        ("mqa", SA),
        ("mqa", CLA),
    ],
)
def test_of_structures_it_is_the_derivative_of_the_loss(shape: str, plan: SharingPlan) -> None:
    """Attention outputs moved a little towards those of the changed model, on its own inputs."""
    base = dense(shape)
    changed = convert(base, plan).eval()
    (found,) = slopes(lambda: base, [Change(lambda: changed, EVERY)], batches())
    ids = batches()[0]["input_ids"]
    inputs: list[torch.Tensor] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kw: inputs.append(args[0] if args else kw["hidden_states"]),
            with_kwargs=True,
        )
        for layer in base.model.layers
    ]
    outputs: dict[str, list[torch.Tensor]] = {"now": [], "then": []}
    with torch.no_grad():
        base(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        for name, model in (("now", base), ("then", changed)):
            given = iter(inputs)
            for layer in model.model.layers:
                layer.self_attn.register_forward_pre_hook(
                    lambda m, args, kw, given=given: (
                        ((next(given), *args[1:]), kw)
                        if args
                        else (args, kw | {"hidden_states": next(given)})
                    ),
                    with_kwargs=True,
                )
                layer.self_attn.o_proj.register_forward_hook(
                    lambda m, args, out, name=name: outputs[name].append(out)
                )
            model(ids, use_cache=False)
        moved = dense(shape).double()
        step = torch.zeros((), dtype=torch.float64)
        for at, layer in enumerate(moved.model.layers):
            change = (outputs["then"][at] - outputs["now"][at]).double()
            layer.self_attn.o_proj.register_forward_hook(
                lambda m, args, out, change=change: out + step * change
            )
        losses = []
        for size in (-0.02, -0.01, 0.01, 0.02):
            step.fill_(size)
            logits = moved(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses.append(float(functional.cross_entropy(logits, ids[:, 1:].flatten())))
    derivative = (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / 0.12
    assert found == pytest.approx(derivative, rel=1e-3, abs=2e-5)
    assert abs(found) > 1e-4


def test_nothing_to_predict_is_refused() -> None:
    ids = batches(1)[0]["input_ids"]
    nothing = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}]
    model = dense("mha")
    with pytest.raises(PostshareError, match="no token to predict"):
        slopes(lambda: model, [], nothing)
