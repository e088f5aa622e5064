"""Exports with spans and pooled KV heads, from dense and from trained folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import sa_models.attention as attention_module
from sa_models import AttentionSpan, HeadTie, PostshareError, SharedLlamaForCausalLM, SharingPlan
from sa_models.attention import SharedAttention
from sa_models.export.verify import verify_equal
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.ties import materialize_
from sa_models.weights.compact_folder import ExpandedFolder, open_weights
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import convert, converted
from tests.support.exports import check_without_package, export, load, sha256
from tests.support.reference import SPAN_PLANS, Reference, dense, shared, some_plan, tokens

KINDS = (*SPAN_PLANS, "pooled, both, ties")


def plan_of(kind: str, shape: str = "gqa") -> SharingPlan:
    if kind != "pooled, both, ties":
        return some_plan(kind, shape)
    plan = some_plan("pooled, both", shape)
    last = (plan.kv_heads or 1) - 1
    ties = (
        HeadTie((2, 0), (0, last), ("q", "k", "v", "o")),
        HeadTie((1, last), (0, last), ("v", "o")),
    )
    return SharingPlan(ties, plan.kv_heads, spans=plan.spans)


def make_source(folder: Path, shape: str = "gqa", size: int | str = "1GB") -> WeightsFolder:
    dense(shape).save_pretrained(folder, max_shard_size=size)
    return WeightsFolder(folder)


def train(model: LlamaForCausalLM, seed: int = 1) -> LlamaForCausalLM:
    """Other weights, as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.05 * torch.randn(parameter.shape))
    return model


def make_trained(folder: Path, plan: SharingPlan, shape: str = "gqa") -> LlamaForCausalLM:
    """A model of the plan's structure that was trained and saved."""
    model = train(convert(dense(shape), plan))
    model.save_pretrained(folder)
    return model


def compact_of(trained: LlamaForCausalLM, plan: SharingPlan) -> SharedLlamaForCausalLM:
    materialize_(dict(trained.named_parameters()), plan.layout(trained.config), plan)
    return SharedLlamaForCausalLM.from_materialized(trained, plan)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(tokens()).logits


# --- what is exported -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gqa", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_dense_folder(tmp_path: Path, kind: str, shape: str) -> None:
    source, plan = make_source(tmp_path / "source", shape, 9000), plan_of(kind, shape)
    result = export(
        source, plan, tmp_path / "export", formats=["compact"], shard_bytes=9000, leaders="mean"
    )
    model = load(result.paths["compact"])
    assert type(model) is SharedLlamaForCausalLM
    assert model.config.plan == plan
    expected = Reference.of(dense(shape), plan)(tokens()).logits
    assert (logits(model) - expected).abs().max() <= 1e-5
    in_memory = shared(dense(shape), plan)
    for name, parameter in in_memory.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert (logits(model) - logits(in_memory)).abs().max() <= 1e-5

    savings = plan.savings(source.config)
    assert result.bytes == {"compact": 4 * savings.stored_parameters}
    assert sum(p.nbytes for p in model.parameters()) == result.bytes["compact"]


@pytest.mark.parametrize("leaders", ["mean", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_trained_folder(tmp_path: Path, kind: str, leaders: Literal["mean", "copy"]) -> None:
    """What was converted before training is not converted again."""
    plan = plan_of(kind)
    trained = make_trained(tmp_path / "trained", plan)
    result = export(
        open_weights(tmp_path / "trained"),
        plan,
        tmp_path / "export",
        formats=["compact"],
        leaders=leaders,
        base_config=dense().config,
    )
    model = load(result.paths["compact"])
    expected = compact_of(trained, plan)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert torch.equal(logits(model), logits(expected))
    manifest = json.loads((result.paths["compact"] / "manifest.json").read_text())
    count = sum(p.numel() for p in dense().parameters())
    assert manifest["tensors"]["base_parameters"] == count
    assert manifest["tensors"]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("ties", [(), (HeadTie((3, 1), (0, 0), ("q", "k", "v", "o")),)])
def test_pooled_heads_alone_have_a_stock_form(
    tmp_path: Path, ties: tuple[HeadTie, ...], trained: bool
) -> None:
    plan = SharingPlan(ties, kv_heads=2)
    if trained:
        expected = make_trained(tmp_path / "source", plan)
        source = open_weights(tmp_path / "source")
    else:
        source, expected = make_source(tmp_path / "source"), convert(dense(), plan)
    materialize_(dict(expected.named_parameters()), plan.layout(expected.config), plan)
    result = export(source, plan, tmp_path / "export", base_config=dense().config)
    compact, stock = load(result.paths["compact"]), load(result.paths["dense"])
    assert type(stock) is LlamaForCausalLM
    assert stock.config.num_key_value_heads == 2
    config = json.loads((result.paths["dense"] / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] == 2
    assert "sharing" not in config
    for name, parameter in expected.named_parameters():
        assert torch.equal(stock.get_parameter(name), parameter), name
    for model in (compact, stock):
        assert (logits(model) - logits(expected)).abs().max() <= 1e-5
    savings = plan.savings(dense().config)
    assert result.bytes["compact"] == 4 * savings.stored_parameters
    assert result.bytes["dense"] == 4 * (savings.stored_parameters + savings.tied_parameters)


@pytest.mark.parametrize("kind", ["sa", "cla mapped", "pooled, both, ties"])
def test_other_dtypes_and_merges(tmp_path: Path, kind: str) -> None:
    source, plan = make_source(tmp_path / "source"), plan_of(kind)
    options: dict[str, Any] = {"formats": ["compact"], "dtype": torch.bfloat16, "merge": "mean"}
    model = load(export(source, plan, tmp_path / "export", **options).paths["compact"])
    assert model.dtype == torch.bfloat16
    expected = convert(dense(), plan)
    materialize_(dict(expected.named_parameters()), plan.layout(expected.config), plan, "mean")
    for name, parameter in compact_of(expected, SharingPlan(spans=plan.spans)).named_parameters():
        if model.get_parameter(name).shape == parameter.shape:
            assert torch.equal(model.get_parameter(name), parameter.bfloat16()), name
    assert (logits(model.float()) - logits(expected)).abs().max() <= 0.1


def test_a_healed_compact_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    for kind in ("both, ties", "pooled, both, ties"):
        plan, folder = plan_of(kind), tmp_path / kind
        source = make_source(folder / "source")
        first = export(source, plan, folder / "first", formats=["compact"])
        again = ExpandedFolder(first.paths["compact"])
        second = export(again, plan, folder / "second", formats=["compact"])
        for name in ("model.safetensors", "config.json"):
            assert sha256(first.paths["compact"] / name) == sha256(second.paths["compact"] / name)


def test_a_released_plan_with_spans(tmp_path: Path) -> None:
    chain = (HeadTie((1, 0), (0, 0), ("v",)), HeadTie((5, 0), (1, 0), ("v",)))
    plan = SharingPlan(chain, spans=(AttentionSpan(2, (3,)),), released=True)
    result = export(make_source(tmp_path / "s"), plan, tmp_path / "export", formats=["compact"])
    model = load(result.paths["compact"])
    assert model.config.plan == SharingPlan(chain[1:], spans=plan.spans)
    expected = Reference.of(dense(), plan.effective())(tokens()).logits
    assert (logits(model) - expected).abs().max() <= 1e-5


def test_the_manifest_says_what_was_dropped(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    spans = (AttentionSpan(0, (1,)), AttentionSpan(2, (3, 4), "kv"))
    facts = {}
    for name, plan, options in (
        ("sa", SharingPlan(spans=spans[:1]), {}),
        ("both", SharingPlan(spans=spans), {"leaders": "copy"}),
        ("pooled", SharingPlan(kv_heads=1, spans=spans), {}),
        ("plain", SharingPlan(), {}),
    ):
        path = export(source, plan, tmp_path / name, formats=["compact"], **options).paths
        facts[name] = json.loads((path["compact"] / "manifest.json").read_text())
        assert facts[name]["plan"] == plan.to_dict()

    def name_of(layer: int, p: str) -> str:
        return f"model.layers.{layer}.self_attn.{p}_proj.weight"

    assert facts["plain"]["dropped"] == []
    assert facts["sa"]["dropped"] == [name_of(1, "k"), name_of(1, "q")]
    dropped = [(1, "k"), (1, "q"), (3, "k"), (3, "v"), (4, "k"), (4, "v")]
    assert facts["both"]["dropped"] == [name_of(*where) for where in dropped]
    leaders = {name: fact["leaders"] for name, fact in facts.items()}
    assert leaders == {"sa": None, "both": "copy", "pooled": "mean", "plain": None}
    # 4 KV heads of 4, keys and values, fp32: 128 bytes a token and layer.
    cache = {name: fact["cache"]["bytes_per_token"] for name, fact in facts.items()}
    assert cache == {
        "plain": 6 * 128,
        "sa": 5 * 128 + 64,
        "both": 3 * 128 + 64,
        "pooled": 3 * 32 + 16,
    }
    assert {fact["cache"]["base_bytes_per_token"] for fact in facts.values()} == {6 * 128}


def test_it_loads_where_the_package_is_not_installed(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), plan_of("pooled, both, ties")
    result = export(source, plan, tmp_path / "export", formats=["compact"])
    check_without_package(result.paths["compact"], tmp_path)


# --- what is refused ------------------------------------------------------------------------------


def test_spans_have_no_dense_form(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), plan_of("sa")
    for formats in (["dense"], ["compact", "dense"]):
        with pytest.raises(PostshareError, match=r"no dense form.*formats \[compact\]"):
            export(source, plan, tmp_path / "export", formats=formats)
        assert not (tmp_path / "export").exists()


def test_a_folder_trained_with_other_spans(tmp_path: Path) -> None:
    make_trained(tmp_path / "trained", plan_of("sa"))
    source = open_weights(tmp_path / "trained")
    for plan in (plan_of("cla"), SharingPlan(), SharingPlan(kv_heads=2, spans=plan_of("sa").spans)):
        with pytest.raises(PostshareError, match="other spans or other KV heads than the plan"):
            export(source, plan, tmp_path / "export", formats=["compact"])
        assert not (tmp_path / "export").exists()


def test_a_finished_export_with_other_leaders(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), plan_of("cla")
    options: dict[str, Any] = {"folder": tmp_path / "export", "formats": ["compact"]}
    first = export(source, plan, **options)
    before = sha256(first.paths["compact"] / "model.safetensors")
    export(source, plan, **options)
    with pytest.raises(PostshareError, match=r"another export \(leaders 'mean', not 'copy'\)"):
        export(source, plan, **options, leaders="copy")
    assert sha256(first.paths["compact"] / "model.safetensors") == before


# --- verification can fail ------------------------------------------------------------------------


def test_one_changed_byte_of_a_leader_is_caught(tmp_path: Path) -> None:
    source, plan = make_source(tmp_path / "source"), plan_of("both, ties")
    result = export(source, plan, tmp_path / "export", formats=["compact"])
    expected = MaterializedReader(converted(source, plan), plan)
    verify_equal(ExpandedFolder(result.paths["compact"]), expected)
    file = result.paths["compact"] / "model.safetensors"
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    name = "model.layers.2.self_attn.v_proj.weight"
    raw[8 + size + json.loads(raw[8 : 8 + size])[name]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PostshareError, match=r"layers\.2\.self_attn\.v_proj\.weight differs"):
        verify_equal(ExpandedFolder(result.paths["compact"]), expected)


def no_map(self: SharedAttention, x: torch.Tensor) -> torch.Tensor:
    return x


def wrong_pairs(self: SharedAttention, query: Any, key: Any, value: Any) -> Any:
    """Every head reads the keys of its own group, not those of the head it is mapped to."""
    mapped = query[:, list(self.head_map or range(query.shape[1]))]
    groups = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    return (mapped, *groups)


def rolled(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return right_mix(weights.roll(1, dims=1), value)


right_mix, right_init = attention_module.mix_values, SharedAttention.__init__


def other_head(self: SharedAttention, *args: Any) -> None:
    """The first two entries of every head map are exchanged."""
    right_init(self, *args)
    if self.head_map is not None:
        self.head_map = (self.head_map[1], self.head_map[0], *self.head_map[2:])


@pytest.mark.parametrize(
    ("kind", "place", "name", "wrong", "layer"),
    [
        ("sa interleaved, mapped", SharedAttention, "_mapped", no_map, 2),
        ("sa interleaved, mapped", SharedAttention, "_paired", wrong_pairs, 2),
        ("sa interleaved, mapped", SharedAttention, "__init__", other_head, 2),
        ("sa", attention_module, "mix_values", rolled, 1),
        ("cla mapped", SharedAttention, "_mapped", no_map, 1),
        ("cla mapped", SharedAttention, "__init__", other_head, 1),
    ],
)
def test_a_layer_that_computes_something_else_is_caught(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    place: Any,
    name: str,
    wrong: Any,
    layer: int,
) -> None:
    """The tensors are right, the compact model's arithmetic is not; by replay or by reuse."""
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(PostshareError, match=f"layer {layer} computes other outputs"):
        export(
            make_source(tmp_path / "source"),
            plan_of(kind),
            tmp_path / "export",
            formats=["compact"],
        )
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("share", ["attention", "kv"])
def test_a_leader_that_hands_on_something_else_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    right = SharedAttention.forward

    def wrong(self: SharedAttention, *args: Any, **kwargs: Any) -> Any:
        output, weights, handed = right(self, *args, **kwargs)
        return output, weights, tuple(tensor.roll(1, dims=1) for tensor in handed)

    monkeypatch.setattr(SharedAttention, "forward", wrong)
    plan = SharingPlan(spans=(AttentionSpan(1, (3,), share),))
    with pytest.raises(PostshareError, match="layer 3 computes other outputs"):
        export(make_source(tmp_path / "s"), plan, tmp_path / "export", formats=["compact"])


def test_a_layer_that_is_not_finite_is_caught(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        attention_module, "mix_values", lambda *x: right_mix(*x).fill_(float("nan"))
    )
    with pytest.raises(PostshareError, match="layer 1 computes other outputs"):
        export(make_source(tmp_path / "s"), plan_of("sa"), tmp_path / "e", formats=["compact"])


def test_modules_are_looked_up_as_named() -> None:
    """A follower has no modules that a tool could find and train in vain."""
    model = convert(dense(), plan_of("both"))
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert "model.layers.1.self_attn.k_proj" not in linear
    assert "model.layers.1.self_attn.v_proj" in linear
