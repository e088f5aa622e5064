"""Merges that write kept projections: what they keep, and that every way to write them agrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.export.export import export_model
from sa_models.heads import HeadLayout
from sa_models.materialize.gauge import absorbed, align_planes, align_values
from sa_models.materialize.merge import check_merge, groups
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.ties import materialize_, unit
from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support.gauge import HEAD_DIM, change_gauge_, plan_of, tiny, tokens


def slices(model: LlamaForCausalLM) -> dict[tuple[str, int, int], torch.Tensor]:
    layout, parameters = HeadLayout.from_config(model.config), dict(model.named_parameters())
    return {
        (p, layer, u): unit(parameters, layout, p, layer, u).detach().clone()
        for p in "qkvo"
        for layer in range(layout.layers)
        for u in range(layout.units)
    }


def merge_(model: LlamaForCausalLM, plan: SharingPlan, merge: str) -> None:
    plan.validate(model.config)
    layout = HeadLayout.from_config(model.config)
    materialize_(dict(model.named_parameters()), layout, plan, merge)


def twins(kv_heads: int) -> LlamaForCausalLM:
    """Unit (2, 0) is unit (0, last) in another gauge."""
    model = tiny(kv_heads)
    last = HeadLayout.from_config(model.config).units - 1
    merge_(model, plan_of(((2, 0), (0, last), "qkvo")), "copy")
    change_gauge_(model)
    return model


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("projections", ["qkvo", "qkv", "qk", "v", "o", "qo", "k"])
def test_the_mean_of_a_head_and_itself_is_itself(kv_heads: int, projections: str) -> None:
    model, plain, ids = twins(kv_heads), twins(kv_heads), tokens()
    last = HeadLayout.from_config(model.config).units - 1
    plan = plan_of(((2, 0), (0, last), projections))
    before = model(ids).logits
    merge_(model, plan, "aligned_mean")
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    written = slices(model)
    for p in projections:
        assert torch.equal(written[p, 2, 0], written[p, 0, last])
    merge_(plain, plan, "mean")
    assert (plain(ids).logits - before).abs().max() > 0.05


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_values_of_a_twin_are_absorbed(kv_heads: int) -> None:
    model, ids = twins(kv_heads), tokens()
    last = HeadLayout.from_config(model.config).units - 1
    before, old = model(ids).logits, slices(model)
    merge_(model, plan_of(((2, 0), (0, last), "qkv")), "absorb")
    # q and k are in the source's gauge, together: the function is that of the twin.
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    new = slices(model)
    changed = {key for key in new if not torch.equal(new[key], old[key])}
    assert changed == {(p, 2, 0) for p in "qkvo"}


def test_slices_are_those_of_the_definition() -> None:
    """Two targets: one shares v, the other v and o; and one of q and k."""
    model = tiny(2)
    old = slices(model)
    plan = plan_of(((1, 0), (0, 1), "v"), ((2, 1), (0, 1), "kvo"))
    merge_(model, plan, "aligned_mean")
    new = slices(model)
    source = old["v", 0, 1], old["o", 0, 1]
    first = align_values(source, (old["v", 1, 0], old["o", 1, 0]))
    second = align_values(source, (old["v", 2, 1], old["o", 2, 1]))
    v = (
        old["v", 0, 1] + first.m @ old["v", 1, 0].double() + second.m @ old["v", 2, 1].double()
    ) / 3
    for where in ((0, 1), (1, 0), (2, 1)):
        torch.testing.assert_close(new["v", *where].double(), v, rtol=0, atol=1e-6)
    kept = torch.cat([first.inverse.T @ head.double() for head in old["o", 1, 0].split(HEAD_DIM)])
    torch.testing.assert_close(new["o", 1, 0].double(), kept, rtol=0, atol=1e-6)
    o = (old["o", 0, 1] + second.apply("o", old["o", 2, 1])) / 2
    for where in ((0, 1), (2, 1)):
        torch.testing.assert_close(new["o", *where].double(), o, rtol=0, atol=1e-6)
    planes = align_planes(
        (old["q", 0, 1], old["k", 0, 1]), (old["q", 2, 1], old["k", 2, 1]), HEAD_DIM
    )
    k = (old["k", 0, 1] + planes.apply("k", old["k", 2, 1])) / 2
    torch.testing.assert_close(new["k", 2, 1].double(), k, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        new["q", 2, 1].double(), planes.apply("q", old["q", 2, 1]), rtol=0, atol=1e-6
    )
    untouched = {("q", 0, 1), ("q", 1, 0), ("k", 1, 0), *((p, 1, 1) for p in "qkvo")}
    assert all(torch.equal(new[key], old[key]) for key in untouched)


CASES = [
    (4, "qkv", "aligned_mean", "float32", "float32"),
    (2, "qkvo", "aligned_mean", "bfloat16", "bfloat16"),
    (1, "v", "aligned_mean", "float32", "bfloat16"),
    (4, "qkv", "absorb", "bfloat16", "float32"),
    (2, "qv", "absorb", "float32", "float32"),
]


@pytest.mark.parametrize(("kv_heads", "projections", "merge", "stored", "dtype"), CASES)
def test_materialized_is_read_is_exported(
    tmp_path: Path, kv_heads: int, projections: str, merge: str, stored: str, dtype: str
) -> None:
    tiny(kv_heads).to(getattr(torch, stored)).save_pretrained(tmp_path / "source")
    source, kind = WeightsFolder(tmp_path / "source"), getattr(torch, dtype)
    last = HeadLayout.from_config(source.config).units - 1
    plan = plan_of(((1, 0), (0, last), projections), ((2, last), (0, last), projections))
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    merge_(expected, plan, merge)
    reader = MaterializedReader(source, plan, merge, kind)
    for name, parameter in expected.named_parameters():
        assert torch.equal(reader.read(name), parameter.to(kind)), name
    result = export_model(
        source, plan, tmp_path / "export", dtype=kind, shard_bytes=10**9, merge=merge
    )
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(result.paths[form]).float().eval()(tokens()).logits
            for form in ("compact", "dense")
        ]
        for parameter in expected.parameters():
            parameter.data = parameter.data.to(kind).float()
        logits.append(expected.eval()(tokens()).logits)
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1], logits[2], rtol=0, atol=1e-5)


def test_absorbing_comes_closer_than_copying() -> None:
    model, copied = tiny(4), tiny(4)
    old = slices(model)
    plan = plan_of(((2, 1), (0, 3), "qkv"))
    merge_(model, plan, "absorb")
    merge_(copied, plan, "copy")

    def distance(new: dict) -> float:
        maps = [(x["o", 2, 1].T @ x["v", 2, 1]).double() for x in (old, new)]
        return float((maps[0] - maps[1]).norm())

    new = slices(model)
    assert distance(new) < 0.9 * distance(slices(copied))
    expected = absorbed(old["v", 2, 1], old["o", 2, 1], old["v", 0, 3])
    torch.testing.assert_close(new["o", 2, 1].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ties", "merge", "message"),
    [
        ([((2, 0), (0, 0), "q"), ((2, 0), (1, 0), "k")], "aligned_mean", "from two sources"),
        ([((1, 0), (0, 0), "v"), ((2, 0), (1, 0), "o")], "absorb", "keeps one of v and o"),
        ([((2, 0), (0, 0), "qkvo")], "absorb", "no tie does that"),
    ],
)
def test_plans_that_no_gauge_fits(ties: list, merge: str, message: str) -> None:
    with pytest.raises(PostshareError, match=message):
        check_merge(plan_of(*ties), merge)


def test_what_may_stay() -> None:
    """A source of v may be a target of q and k; a follower has no k to align."""
    plan = plan_of(((1, 0), (0, 0), "qk"), ((2, 0), (1, 0), "vo"))
    check_merge(plan, "aligned_mean")
    assert [(g.pair, g.source) for g in groups(plan.ties)] == [("qk", (0, 0)), ("vo", (1, 0))]
    spans = (AttentionSpan(1, (2,), "attention"),)
    check_merge(SharingPlan(plan_of(((2, 0), (0, 0), "v")).ties, spans=spans), "absorb")
    kv = (AttentionSpan(1, (2,), "kv"),)
    with pytest.raises(PostshareError, match=r"unit \[2, 0\] has no k, which its span shares"):
        check_merge(SharingPlan(plan_of(((2, 0), (0, 0), "q")).ties, spans=kv), "aligned_mean")
