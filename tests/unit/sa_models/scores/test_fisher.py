"""Estimates against loops and finite differences; losses from a layer against full passes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from sa_models import AttentionSpan, HeadTie, SharingPlan
from sa_models.calibration.partial_forward import Batch, Restart
from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout, unit_view
from sa_models.scores.fisher import CIRCUITS, combined, estimate_sensitivity
from sa_models.search.actions import WHOLE, Action
from sa_models.search.measured_loss import MeasuredLoss
from sa_models.weights.structure import convert
from tests.support.reference import LAYERS, VOCABULARY, Reference, dense

LENGTH = 9
SHARES = [("q", "k", "v", "o"), ("q", "k", "v"), ("q", "k"), ("v", "o"), ("v",), ("k", "o"), ("o",)]


def text(rows: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)


def batches(rows: int = 3) -> list[Batch]:
    ids = text(rows)
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}] if rows > 2 else [{"input_ids": ids}]


def full_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Nats per token, float64."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def view(model: LlamaForCausalLM, layer: int, projection: str, unit: int) -> torch.Tensor:
    layout = HeadLayout.from_config(model.config)
    weight = model.get_parameter(layout.parameter_name(layer, projection))
    return unit_view(weight, layout, projection)[unit]


# --- measured -------------------------------------------------------------------------------------


def spans(shape: str) -> SharingPlan:
    share = "kv" if shape == "gqa" else "attention"
    return SharingPlan(spans=(AttentionSpan(1, (2, 3), share),))


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa", "odd"])
@pytest.mark.parametrize("with_spans", [False, True])
def test_the_loss_from_a_layer_is_that_of_the_full_pass(shape: str, with_spans: bool) -> None:
    model = dense(shape)
    if with_spans:
        model = convert(model, spans(shape)).eval()
    restart = Restart(model, batches())
    for layer in range(LAYERS):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        with torch.no_grad():
            before = weight.clone()
            weight *= 1.5
        measured = restart.run_from(layer).loss
        again = Restart(model, batches())
        assert measured == again.loss  # bit for bit
        with torch.no_grad():
            expected = full_loss(model, text())
            weight.copy_(before)
        assert measured == pytest.approx(float(expected), abs=1e-6)
        assert measured != restart.loss
    passes = restart.passes
    restart.run_from(LAYERS - 1)
    assert restart.passes - passes == pytest.approx(1 / LAYERS)


def test_positions_and_labels_of_documents_are_kept() -> None:
    model, ids = dense("gqa"), text(1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    labels = ids.clone()
    labels[0, 4] = -100
    found = Restart(model, [{"input_ids": ids, "position_ids": positions, "labels": labels}])
    with torch.no_grad():
        parts = [full_loss(model, ids[:, :4]) * 3, full_loss(model, ids[:, 4:]) * 4]
    assert found.tokens == 7
    assert found.loss == pytest.approx(float(sum(parts)) / 7, abs=1e-6)


@pytest.mark.parametrize("shape", ["mha", "gqa", "odd"])
def test_measured_states_are_those_of_the_plan(shape: str) -> None:
    """Against the model written out head by head, whatever the base and the order."""
    model = dense(shape)
    untouched = {name: p.clone() for name, p in model.named_parameters()}
    tie = Action((3, 1), (0, 2), ("q", "k", "v"))
    other = Action((4, 0), (2, 1), PROJECTIONS)
    gone, dropped = Action((2, 0)), Action((1, WHOLE))
    measured = MeasuredLoss(model, batches())
    for state, base in (
        ({tie}, set()),
        ({tie, other}, {tie}),
        ({tie, other, gone}, {tie, other}),
        ({gone, other}, {tie}),
        ({gone, dropped}, {dropped, tie}),
        ({dropped, tie}, {gone}),
        (set(), {tie}),
    ):
        measured.rebase(frozenset(base))
        found = measured(frozenset(state))
        plain = dense(shape)
        ties = tuple(HeadTie(a.target, a.source, a.projections) for a in state if a.source)
        units = HeadLayout.from_config(plain.config).units
        removed = [(2, 0)] if gone in state else []
        removed += [(1, unit) for unit in range(units)] if dropped in state else []
        reference = Reference.of(plain, SharingPlan(ties=ties, removed=tuple(removed)))
        logits = reference(text()).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), text()[:, 1:].flatten())
        assert found == pytest.approx(float(expected), abs=2e-6)
    measured.restore()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched[name]), name


# --- estimates ------------------------------------------------------------------------------------


def contributions(
    model: LlamaForCausalLM, ids: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What every unit of a layer adds to its attention's output, and that output's gradient.

    (units, length, hidden) and (length, hidden), of one row.
    """
    layout, seen = HeadLayout.from_config(model.config), {}

    def given(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen["input"], seen["output"] = args[0], output
        output.retain_grad()

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_hook(given)
    (full_loss(model, ids) * (ids.numel() - 1)).backward()
    handle.remove()
    width = layout.width("o")
    parts = [
        seen["input"][0, :, u * width : (u + 1) * width] @ view(model, layer, "o", u)
        for u in range(layout.units)
    ]
    return torch.stack(parts).detach(), seen["output"].grad[0]


def test_removals_are_those_of_a_plain_loop() -> None:
    model = dense("gqa")
    layout = HeadLayout.from_config(model.config)
    found = estimate_sensitivity(model, batches()).removal
    tokens = text().numel() - len(text())
    for layer in range(LAYERS):
        first, second = torch.zeros(layout.units), torch.zeros(layout.units)
        for row in text():
            given, gradient = contributions(model, row[None], layer)
            change = -(given * gradient).sum(-1)
            first += change.sum(-1)
            second += change.square().sum(-1) / 2
        assert torch.allclose(found.first[layer].float(), first / tokens, atol=1e-7)
        assert torch.allclose(found.second[layer].float(), second / tokens, atol=1e-7)


def test_drops_are_those_of_a_plain_loop() -> None:
    """What all units add together: their own second orders do not sum to it."""
    model = dense("gqa")
    found = estimate_sensitivity(model, batches(), without=(3,))
    tokens = text().numel() - len(text())
    for layer in (0, 2, 5):
        first, second = 0.0, 0.0
        for row in text():
            given, gradient = contributions(model, row[None], layer)
            change = -(given.sum(0) * gradient).sum(-1)
            first += float(change.sum()) / tokens
            second += float(change.square().sum()) / 2 / tokens
        assert float(found.drop.first[layer]) == pytest.approx(first, abs=1e-7, rel=1e-4)
        assert float(found.drop.second[layer]) == pytest.approx(second, abs=1e-7, rel=1e-4)
        parts = float(found.removal.second[layer].sum())
        assert parts != pytest.approx(second, rel=1e-2)
    assert found.drop.total[3].isnan()
    assert found.drop.total.shape == (LAYERS,)


def test_the_first_order_is_the_slope_of_the_measured_loss() -> None:
    """Differences of fourth order in a gate on the head's output; norms are fp32 in any model."""
    model = dense("odd").double()
    found = estimate_sensitivity(model, batches()).removal.first
    for layer, unit in itertools.product((0, 2, 5), range(3)):
        columns = view(model, layer, "o", unit)
        losses = []
        with torch.no_grad():
            before = columns.clone()
            for gate in (0.96, 0.98, 1.02, 1.04):
                columns.copy_(before * gate)
                losses.append(float(full_loss(model, text())))
            columns.copy_(before)
        slope = (-losses[0] + 8 * losses[1] - 8 * losses[2] + losses[3]) / 0.24  # of taking it away
        assert float(found[layer, unit]) == pytest.approx(slope, rel=5e-4, abs=5e-5)


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        *(("gqa", share) for share in SHARES),
        *(("mqa", share) for share in (SHARES[0], *CIRCUITS)),
        *(("odd", share) for share in (("k",), *CIRCUITS)),
    ],
)
def test_ties_are_those_of_a_plain_loop(shape: str, share: tuple[str, ...]) -> None:
    """Every pair: the target's weights are overwritten, and its layer's attention is run."""
    model = dense(shape)
    layout = HeadLayout.from_config(model.config)
    found = estimate_sensitivity(model, batches(2), [share]).ties[share]
    tokens = text(2).numel() - 2
    units = range(layout.units)
    for layer, other in ((4, 2),):
        for unit, source in itertools.product(units, units):
            first, second = 0.0, 0.0
            for row in text(2):
                now, gradient = contributions(model, row[None], layer)
                changed = dense(shape)
                with torch.no_grad():
                    for p in share:
                        view(changed, layer, p, unit).copy_(view(model, other, p, source))
                    for below in range(layer):  # the layer's input is that of the unchanged model
                        changed.model.layers[below] = model.model.layers[below]
                then, _ = contributions(changed, row[None], layer)
                change = ((then[unit] - now[unit]) * gradient).sum(-1)
                first += float(change.sum()) / tokens
                second += float(change.square().sum()) / 2 / tokens
            at = (layer, unit, other, source)
            assert float(found.first[at]) == pytest.approx(first, abs=2e-7, rel=1e-4)
            assert float(found.second[at]) == pytest.approx(second, abs=2e-7, rel=1e-4)
    assert found.total[3, 0, 3].isnan().all()
    assert found.total[2, 0, 4].isnan().all()


def test_gradient_importance_is_that_of_autograd() -> None:
    model = dense("gqa")
    found = estimate_sensitivity(model, batches()).gradient
    full_loss(model, text()).backward()
    layout = HeadLayout.from_config(model.config)
    for layer, unit in itertools.product(range(LAYERS), range(layout.units)):
        total = 0.0
        for p in PROJECTIONS:
            name = layout.parameter_name(layer, p)
            weight = model.get_parameter(name)
            total += unit_view(weight * weight.grad, layout, p)[unit].sum().item()
        assert float(found[layer, unit]) == pytest.approx(abs(total), rel=1e-3, abs=1e-7)


def test_parts_make_the_whole_and_nothing_is_left_behind() -> None:
    model = convert(dense("mha"), spans("mha"))
    model.train()
    one = model.model.layers[0].mlp.up_proj.weight
    one.grad = torch.ones_like(one)
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    share = ("q", "k", "v")
    whole = estimate_sensitivity(model, batches(), [share], without=(2, 3))
    parts = [estimate_sensitivity(model, [b], [share], without=(2, 3)) for b in batches()]
    both = combined(*parts)
    assert both.tokens == whole.tokens
    for a, b in (
        (both.removal.total, whole.removal.total),
        (both.drop.total, whole.drop.total),
        (both.ties[share].total, whole.ties[share].total),
    ):
        assert torch.allclose(a, b, equal_nan=True, atol=1e-12)
    assert whole.removal.total[2:4].isnan().all()
    assert whole.ties[share].total[4, :, 2:4].isnan().all()
    assert not whole.ties[share].total[4, :, 1].isnan().any()
    assert model.training
    assert one.grad is not None
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters() if p is not one)
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)


def test_text_that_cannot_be_used_is_refused() -> None:
    model, ids = dense("mha"), text(1)
    nothing = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}]
    padded = [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}]
    for given, part in ((nothing, "no token to predict"), (padded, "have padding")):
        for measure in (Restart, estimate_sensitivity):
            with pytest.raises(PostshareError, match=part):
                measure(model, given)
