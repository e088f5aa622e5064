"""Merges on calibration text against brute force: least squares, and autograd in the gauge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.export.export import export_model
from sa_models.heads import HeadLayout
from sa_models.materialize.gauge import align_planes, align_values
from sa_models.materialize.merge_calibrated import FLOOR, merge_on_text_
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.ties import materialize_
from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import convert
from tests.support.gauge import HEAD_DIM, HEADS, change_gauge_, plan_of, tiny, tokens

MEASURED = ("weighted_mean", "least_squares")


def rows(model: LlamaForCausalLM, p: str, layer: int, at: int) -> torch.Tensor:
    """A unit's slice by index arithmetic of its own, float64; o transposed."""
    weight = getattr(model.model.layers[layer].self_attn, f"{p}_proj").weight.detach().double()
    width = HEAD_DIM * (HEADS // model.config.num_key_value_heads if p in "qo" else 1)
    part = slice(at * width, (at + 1) * width)
    return weight[:, part].T if p == "o" else weight[part]


def aligned(model: LlamaForCausalLM, target: tuple[int, int], source: tuple[int, int]) -> dict:
    """The target's slices in its source's gauge."""

    def pair(ps: str, at: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        return rows(model, ps[0], *at), rows(model, ps[1], *at)

    planes = align_planes(pair("qk", source), pair("qk", target), HEAD_DIM)
    values = align_values(pair("vo", source), pair("vo", target))
    gauge = {"q": planes, "k": planes, "v": values, "o": values}
    return {p: gauge[p].apply(p, rows(model, p, *target)) for p in "qkvo"} | {"m": values.m}


def batches(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]


def seen(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """{(what, layer): float64 (tokens, features)} that q_proj (x) and o_proj (h) are given."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for what, module in (("x", block.self_attn.q_proj), ("h", block.self_attn.o_proj)):

            def keep(module, given, key=(what, layer)):
                found[key] = given[0].detach().double().flatten(0, 1)

            hooks.append(module.register_forward_pre_hook(keep))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def fitted(inputs: list[torch.Tensor], slices: list[torch.Tensor]) -> torch.Tensor:
    """argmin over W (inputs, outputs) of sum |X_i W - X_i W_i|^2 + ridge_i |W - W_i|^2."""
    left, right = [], []
    for x, w in zip(inputs, slices, strict=True):
        ridge = (FLOOR * (x.T @ x).diagonal().mean()).sqrt() * torch.eye(x.shape[1]).double()
        left += [x, ridge]
        right += [x @ w, ridge @ w]
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd").solution


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_least_squares_is_that_of_stacked_activations(kv_heads: int) -> None:
    model, ids = tiny(kv_heads), tokens(blocks=9)
    last = kv_heads - 1
    source, targets = (0, last), [(1, 0), (2, last)]
    ties = [((1, 0), source, "qkvo"), ((2, last), source, "qv")]
    x, parts = seen(model, ids), {at: aligned(model, at, source) for at in targets}
    mine = {p: rows(model, p, *source) for p in "qkvo"}
    expected = {
        p: fitted([x["x", 0], x["x", 1], x["x", 2]], [w[p].T for w in (mine, *parts.values())]).T
        for p in "qv"
    }
    expected["k"] = fitted([x["x", 0], x["x", 1]], [mine["k"].T, parts[1, 0]["k"].T]).T
    group = HEADS // kv_heads
    width = group * HEAD_DIM
    own = x["h", 0][:, last * width : (last + 1) * width]
    other = x["h", 1][:, :width].unflatten(1, (group, HEAD_DIM)) @ parts[1, 0]["m"].T
    expected["o"] = fitted([own, other.flatten(1)], [mine["o"], parts[1, 0]["o"]])
    kept = {p: parts[2, last][p] for p in "ko"}
    untouched = rows(model, "q", 1, 1 % kv_heads).clone() if kv_heads > 1 else None

    merge_on_text_(model, plan_of(*ties), "least_squares", batches(ids))
    for p, value in expected.items():
        for at in (source, (1, 0), (2, last)) if p in "qv" else (source, (1, 0)):
            torch.testing.assert_close(rows(model, p, *at), value, rtol=1e-4, atol=1e-5)
    for p, value in kept.items():  # in the source's gauge, as the q and v that it now has
        torch.testing.assert_close(rows(model, p, 2, last), value, rtol=0, atol=1e-6)
    if untouched is not None:
        assert torch.equal(rows(model, "q", 1, 1), untouched)


def test_least_squares_comes_closer_than_the_mean() -> None:
    """On the text, what the units of v return; on other text too, if less."""
    ids = tokens(blocks=9)
    plan = plan_of(((1, 0), (0, 3), "v"), ((2, 1), (0, 3), "v"))
    before, missed = tiny(4), {}
    x, parts = seen(before, ids), {at: aligned(before, at, (0, 3)) for at in ((1, 0), (2, 1))}
    wanted = [
        (x["x", 0], rows(before, "v", 0, 3)),
        *((x["x", at[0]], part["v"]) for at, part in parts.items()),
    ]
    for merge in ("aligned_mean", "least_squares"):
        model = tiny(4)
        if merge == "least_squares":
            merge_on_text_(model, plan, merge, batches(ids))
        materialize_(
            dict(model.named_parameters()), HeadLayout.from_config(model.config), plan, merge
        )
        v = rows(model, "v", 2, 1)
        missed[merge] = sum(float((x @ (v - w).T).square().sum()) for x, w in wanted)
    assert missed["least_squares"] < 0.98 * missed["aligned_mean"]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_fisher_information_is_that_of_autograd_in_the_gauge(kv_heads: int) -> None:
    """Gradients of a model whose targets are written in the gauge: the same function."""
    model, written, ids = tiny(kv_heads), tiny(kv_heads), tokens(blocks=3)
    last = kv_heads - 1
    source, target = (0, last), (2, 0)
    part = aligned(model, target, source)
    with torch.no_grad():
        for p in "qkvo":
            attention = written.model.layers[2].self_attn
            weight = getattr(attention, f"{p}_proj").weight
            (weight.T if p == "o" else weight)[: len(part[p])] = part[p].float()
    torch.testing.assert_close(written(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    labels = ids.clone()
    labels[1, 4:] = -100
    width = {p: HEAD_DIM * (HEADS // kv_heads if p in "qo" else 1) for p in "qkvo"}
    fisher: dict[str, list[torch.Tensor]] = {}
    for block, label in zip(ids, labels, strict=True):
        written.zero_grad()
        logits = written(block[None]).logits[0, :-1]
        functional.cross_entropy(logits, label[1:], reduction="sum", ignore_index=-100).backward()
        for p in "qkvo":
            grads = [
                getattr(written.model.layers[layer].self_attn, f"{p}_proj").weight.grad.double()
                for layer in (0, 2)
            ]
            first, second = ((g.T if p == "o" else g) for g in grads)
            one = first[last * width[p] : (last + 1) * width[p]], second[: width[p]]
            squares = [g.square() for g in one]
            old = fisher.get(p, [0, 0])
            fisher[p] = [a + b for a, b in zip(old, squares, strict=True)]
    expected = {}
    for p, (f, g) in fisher.items():
        floor = FLOOR * (f.mean() + g.mean()) / 2
        total = (f + floor) * rows(model, p, *source) + (g + floor) * part[p]
        expected[p] = total / (f + g + 2 * floor)
    text = [{"input_ids": ids, "labels": labels}]
    merge_on_text_(model, plan_of((target, source, "qkvo")), "weighted_mean", text)
    for p, value in expected.items():
        for at in (source, target):
            torch.testing.assert_close(rows(model, p, *at), value, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("merge", MEASURED)
@pytest.mark.parametrize("projections", ["qkvo", "qkv", "v", "qo"])
def test_a_head_and_itself_in_another_gauge_are_one(merge: str, projections: str) -> None:
    model, ids = tiny(2), tokens(blocks=9)
    layout = HeadLayout.from_config(model.config)
    twin = plan_of(((2, 0), (0, 1), "qkvo"))
    materialize_(dict(model.named_parameters()), layout, twin)
    change_gauge_(model)
    before = model(ids).logits
    merge_on_text_(model, plan_of(((2, 0), (0, 1), projections)), merge, batches(ids))
    torch.testing.assert_close(model(ids).logits, before, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("merge", MEASURED)
def test_merged_is_read_is_exported(tmp_path: Path, merge: str) -> None:
    model, ids = tiny(2, tie_word_embeddings=True), tokens(blocks=3)
    plan = plan_of(((1, 0), (0, 1), "qkv"), ((2, 1), (0, 1), "kvo"))
    layout = HeadLayout.from_config(model.config)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(PostshareError, match=f"merge {merge} needs calibration text"):
        materialize_(dict(model.named_parameters()), layout, plan, merge)
    model.train()
    merge_on_text_(model, plan, merge, batches(ids))
    assert model.training
    trains = [p.requires_grad for p in model.parameters()]
    assert trains.count(False) == 1
    assert not model.model.norm.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    materialize_(dict(model.named_parameters()), layout, plan, merge)  # nothing left to write
    model.eval().save_pretrained(tmp_path / "merged")
    reader = MaterializedReader(WeightsFolder(tmp_path / "merged"), plan, merge)
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read(name), parameter), name
    result = export_model(
        WeightsFolder(tmp_path / "merged"), plan, tmp_path / "export", dtype=torch.float32,
        shard_bytes=10**9, merge=merge,
    )  # fmt: skip
    for form in ("compact", "dense"):
        loaded = AutoModelForCausalLM.from_pretrained(result.paths[form]).eval()
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merge", MEASURED)
def test_beside_spans(merge: str) -> None:
    """Followers lack q and k (attention) or k and v (kv): v, or o, of theirs can still be tied."""
    ids = tokens(blocks=9)
    spans = (AttentionSpan(1, (2,), "attention"), AttentionSpan(3, (4,), "kv"))
    ties = plan_of(((2, 0), (0, 1), "v"), ((5, 1), (1, 0), "qkv")).ties
    plan = SharingPlan(ties, spans=spans)
    model = convert(tiny(2, layers=6), plan)
    before = model(ids).logits
    merge_on_text_(model, plan, merge, batches(ids))
    for p, target, source in (("v", (2, 0), (0, 1)), ("q", (5, 1), (1, 0)), ("k", (5, 1), (1, 0))):
        assert torch.equal(rows(model, p, *target), rows(model, p, *source))
    assert (model(ids).logits - before).abs().max() > 0.01


@pytest.mark.parametrize("merge", MEASURED)
def test_what_is_refused(merge: str) -> None:
    plan = plan_of(((2, 0), (0, 1), "qkv"))
    with pytest.raises(PostshareError, match="no calibration text"):
        merge_on_text_(tiny(2), plan, merge, [])
    padded = {"input_ids": tokens(), "attention_mask": torch.zeros(2, 12, dtype=torch.int64)}
    with pytest.raises(PostshareError, match="padding"):
        merge_on_text_(tiny(2), plan, merge, [padded])
    split = plan_of(((2, 0), (0, 0), "q"), ((2, 0), (1, 0), "k"))
    with pytest.raises(PostshareError, match="from two sources"):
        merge_on_text_(tiny(2), split, merge, batches(tokens()))
    silent = tiny(2)
    with torch.no_grad():
        for at in (0, 2):
            silent.model.layers[at].input_layernorm.weight.zero_()
    with pytest.raises(PostshareError, match="says nothing finite about"):
        merge_on_text_(silent, plan, merge, batches(tokens()))


@pytest.mark.parametrize("merge", MEASURED)
def test_a_plan_without_ties_leaves_nothing_to_merge(merge: str) -> None:
    model = tiny(kv_heads=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_on_text_(model, SharingPlan(removed=((1, 0),)), merge, batches(tokens(2, 8)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
