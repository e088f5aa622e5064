"""Reconstruction against brute force: whole forward passes, hooks, and stacked least squares."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.materialize.reconstruct_o import (
    FOLDS,
    RIDGES,
    _Sums,
    own_columns,
    reconstruct_,
)
from sa_models.materialize.ties import materialize_
from sa_models.plan import HeadTie, SharingPlan
from sa_models.spans import AttentionSpan
from sa_models.weights.structure import convert
from tests.support.gauge import HEAD_DIM, tiny, tokens

RIDGE = 0.05


def tie(target: tuple[int, int], source: tuple[int, int], projections: str) -> HeadTie:
    return HeadTie(target, source, tuple(projections))


PLANS = {
    "ties of q, k, v": SharingPlan((tie((1, 0), (0, 1), "qkv"), tie((2, 1), (1, 1), "qk"))),
    "tied o": SharingPlan((tie((1, 0), (0, 1), "qkvo"), tie((2, 1), (1, 1), "vo"))),
    "removed": SharingPlan(removed=((1, 1), (2, 0))),
    "both": SharingPlan((tie((2, 0), (1, 0), "qkvo"),), removed=((1, 1),)),
    "span": SharingPlan(spans=(AttentionSpan(1, (2,), "attention"),)),
    "kv span": SharingPlan(spans=(AttentionSpan(0, (1,), "kv"),)),
    "pooled": SharingPlan(kv_heads=1),
}


def changed(reference: LlamaForCausalLM, plan: SharingPlan) -> LlamaForCausalLM:
    model = convert(copy.deepcopy(reference), plan)
    materialize_(dict(model.named_parameters()), HeadLayout.from_config(model.config), plan)
    return model


def streams(model: LlamaForCausalLM, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
    """What o of a layer is given, and the residual stream after attention: float64, (tokens, *)."""
    seen: list[torch.Tensor] = []
    block = model.model.layers[layer]
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0])),
        block.post_attention_layernorm.register_forward_pre_hook(lambda m, a: seen.append(a[0])),
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return tuple(tensor.detach().double().flatten(0, 1) for tensor in seen)


def own_features(plan: SharingPlan, model: LlamaForCausalLM, layer: int) -> list[int]:
    config = model.config
    units = plan.kv_heads or config.num_key_value_heads
    width = HEAD_DIM * config.num_attention_heads // units
    shared = {u for t in plan.ties if "o" in t.projections for u in (t.target, t.source)}
    gone = shared | set(plan.removed)
    return [u * width + i for u in range(units) if (layer, u) not in gone for i in range(width)]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_o_is_the_least_squares_solution(name: str, kv_heads: int) -> None:
    plan = PLANS[name]
    reference = tiny(kv_heads=kv_heads)
    ids = tokens(3, 24)
    model = changed(reference, plan).eval()
    brute = copy.deepcopy(model)
    untouched = {n: p.clone() for n, p in model.named_parameters()}
    found = reconstruct_(
        model, reference, plan, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}], ridge=RIDGE
    )
    first = {"span": 2, "kv span": 0, "pooled": 0}.get(name, 1)
    assert [f.layer for f in found] == [i for i in range(first, 3) if own_features(plan, brute, i)]
    for at in found:
        columns = own_features(plan, brute, at.layer)
        given, stream = streams(brute, ids, at.layer)
        _, wanted = streams(reference, ids, at.layer)
        root = (wanted.square().mean(-1) + reference.config.rms_norm_eps).rsqrt()[:, None]
        a, missing = root * given[:, columns], root * (wanted - stream)
        damp = (RIDGE * (a.T @ a).diagonal().mean()).sqrt() * torch.eye(len(columns)).double()
        solution = torch.linalg.lstsq(
            torch.cat([a, damp]),
            torch.cat([missing, missing.new_zeros(len(columns), missing.shape[1])]),
            driver="gelsd",
        ).solution
        weight = brute.model.layers[at.layer].self_attn.o_proj.weight
        weight[:, columns] = (weight[:, columns].double() + solution.T).float()
        solved = model.model.layers[at.layer].self_attn.o_proj.weight
        torch.testing.assert_close(solved, weight, rtol=1e-4, atol=1e-5)
        others = [i for i in range(weight.shape[1]) if i not in columns]
        before = untouched[f"model.layers.{at.layer}.self_attn.o_proj.weight"]
        assert torch.equal(solved[:, others], before[:, others])
        # The errors that are reported, measured again in whole forward passes.
        _, left = streams(brute, ids, at.layer)
        block = reference.model.layers[at.layer].self_attn.o_proj
        inputs, _ = streams(reference, ids, at.layer)
        added = (root * (inputs @ block.weight.double().T)).square().sum()
        assert at.before == pytest.approx(float(missing.square().sum() / added), rel=1e-3, abs=1e-9)
        after = float((root * (wanted - left)).square().sum() / added)
        assert at.after == pytest.approx(after, rel=1e-3, abs=1e-6)
        assert at.after < at.before
        assert at.ridge == RIDGE
    solved_names = {f"model.layers.{f.layer}.self_attn.o_proj.weight" for f in found}
    for parameter_name, parameter in model.named_parameters():
        if parameter_name not in solved_names:
            assert torch.equal(parameter, untouched[parameter_name]), parameter_name


@pytest.mark.parametrize("rows", [6, 1])
@torch.no_grad()
def test_the_ridge_is_that_of_the_least_error_on_text_that_was_not_fitted(rows: int) -> None:
    """Each fold against the others by stacked least squares; few sequences are cut."""
    plan, reference, ids = PLANS["removed"], tiny(kv_heads=4), tokens(rows, 64)
    model = changed(reference, plan).eval()
    brute = copy.deepcopy(model)
    batches = [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}] if rows > 1 else [{"input_ids": ids}]
    first = reconstruct_(model, reference, plan, batches)[0]
    columns = own_features(plan, brute, first.layer)
    given, stream = streams(brute, ids, first.layer)
    _, wanted = streams(reference, ids, first.layer)
    root = (wanted.square().mean(-1) + reference.config.rms_norm_eps).rsqrt()[:, None]
    a, missing = root * given[:, columns], root * (wanted - stream)
    token = torch.arange(len(a))
    folds = token // 64 % FOLDS if rows >= FOLDS else token % 64 // 16
    errors = {}
    for ridge in RIDGES:
        errors[ridge] = 0.0
        for fold in range(FOLDS):
            fitted, left = folds != fold, folds == fold
            damp = (ridge * (a[fitted].T @ a[fitted]).diagonal().mean()).sqrt()
            solution = torch.linalg.lstsq(
                torch.cat([a[fitted], damp * torch.eye(len(columns)).double()]),
                torch.cat([missing[fitted], missing.new_zeros(len(columns), missing.shape[1])]),
                driver="gelsd",
            ).solution
            errors[ridge] += float((missing[left] - a[left] @ solution).square().sum())
    best = min(errors, key=lambda ridge: errors[ridge])
    assert len({round(error, 6) for error in errors.values()}) == len(errors)
    assert first.ridge == (best if errors[best] < float(missing.square().sum()) else None)


@torch.no_grad()
def test_a_layer_stays_as_it_is_where_no_update_holds_on_other_text() -> None:
    """What is missing has nothing to do with what the heads give."""
    sums = _Sums.zeros(4, 3, torch.device("cpu"))
    torch.manual_seed(0)
    given, missing = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    missing -= given @ torch.linalg.lstsq(given, missing).solution
    sums.add(given, missing, torch.ones(40).double(), torch.arange(40) % FOLDS)
    assert sums.best_ridge() is None


@torch.no_grad()
def test_nothing_is_solved_where_nothing_has_changed() -> None:
    reference = tiny(kv_heads=4)
    source = reference.model.layers[0].self_attn
    target = reference.model.layers[1].self_attn
    for p in "qkv":
        rows = getattr(source, f"{p}_proj").weight[HEAD_DIM : 2 * HEAD_DIM]
        getattr(target, f"{p}_proj").weight[:HEAD_DIM] = rows
    plan = PLANS["ties of q, k, v"]
    plan = SharingPlan(plan.ties[:1])
    model = changed(reference, plan).eval()
    found = reconstruct_(model, reference, plan, [{"input_ids": tokens(3, 24)}])
    assert [f.before for f in found] == [0.0, 0.0]
    for (name, parameter), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name


def test_own_columns_of_a_layer_without_any() -> None:
    layout = HeadLayout.from_config(tiny(kv_heads=4).config)
    ties = tuple(tie((1, unit), (0, unit), "o") for unit in range(layout.units))
    assert list(own_columns(SharingPlan(ties), layout)) == [2]


def test_too_little_text() -> None:
    reference = tiny(kv_heads=4)
    plan = PLANS["removed"]
    model = changed(reference, plan).eval()
    with pytest.raises(PostshareError, match=r"solves for \d+ columns of o and has 8 tokens"):
        reconstruct_(model, reference, plan, [{"input_ids": tokens(1, 8)}])


@pytest.mark.parametrize("merge", ["copy", "mean"])
@torch.no_grad()
def test_sources_that_a_merge_has_changed_are_made_up_for_as_well(merge: str) -> None:
    reference, ids = tiny(kv_heads=4), tokens(6, 24)
    layout = HeadLayout.from_config(reference.config)
    plan = SharingPlan((tie((2, 0), (0, 1), "qkv"),))
    model = copy.deepcopy(reference)
    materialize_(dict(model.named_parameters()), layout, plan, merge)
    found = reconstruct_(model, reference, plan, [{"input_ids": ids}], merge=merge)
    first = 0 if merge == "mean" else 2
    assert [at.layer for at in found] == list(range(first, layout.layers))
    for at in found[:1]:
        assert 0 < at.after < at.before
