"""Removed units: what is left computes, caches, stores and learns what the definition says."""

from __future__ import annotations

import copy
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedCache
from transformers.integrations import flex_attention as library_flex
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sa_models import AttentionSpan, HeadTie, PostshareError, SharingPlan, cache_bytes
from sa_models.export.export import export_model
from sa_models.export.verify import verify_equal
from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.weights.compact_folder import ExpandedFolder
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import convert
from tests.support.reference import (
    LAYERS,
    SHAPES,
    Reference,
    dense,
    exact_norm,
    shared,
    tokens,
    use,
)
from tests.support.transformers_versions import checkpoint_layers, has_fp8_cache, reset_empties

ALL = ("q", "k", "v", "o")
KINDS = ("removed", "ties", "spans", "dropped")
CASES = [*((kind, shape) for kind in KINDS for shape in ("mha", "gqa", "odd"))]
CASES += [("pooled", "mha"), ("pooled", "gqa"), ("dropped", "mqa"), ("dropped, spans", "gqa")]


def some_plan(kind: str, shape: str) -> SharingPlan:
    """The layers 1, 2 and 4 lose other units each; layer 2 keeps a single one.

    Of the kinds *dropped* the first, the last and other layers lose all.
    """
    heads, units = (SHAPES[shape][f"num_{key}_heads"] for key in ("attention", "key_value"))
    last = units - 1
    if kind.startswith("dropped"):
        spans = ()
        if "spans" in kind:
            spans = (AttentionSpan(2, (4,)), AttentionSpan(5, (6,), "kv"))
        at = (0, 1, 3) if spans else (0, 3, 5)
        gone = tuple((layer, unit) for layer in at for unit in range(units))
        ties = (HeadTie((4, 0), (2, last), ("v", "o")),)
        if not spans and units > 1:
            gone += ((1, 1),)
            ties += (HeadTie((4, last), (1, 0), ("q", "k")),)
        return SharingPlan(ties, removed=gone, spans=spans)
    removed = ((1, 1), *((2, unit) for unit in range(units) if unit != 1), (4, last))
    if kind == "removed":
        return SharingPlan(removed=removed)
    if kind == "pooled":
        return SharingPlan(
            (HeadTie((5, 1), (0, 0), ALL), HeadTie((2, 1), (0, 1), ("k", "o"))),
            kv_heads=2,
            removed=((1, 0), (2, 0), (4, 1)),
        )
    # From and to layers with other units; a layer that owns nothing; one unit twice, in two places.
    ties = (
        HeadTie((1, last), (0, 0), ("q", "v")),
        HeadTie((1, last), (0, last), ("k", "o")),
        HeadTie((2, 1), (1, 0), ALL),
        HeadTie((4, 0), (1, 0), ALL),
        HeadTie((4, 1), (0, 1), ("v",)),
    )
    if kind == "ties":
        # Neighbours around a removed unit, whose sources lie side by side.
        ties += (HeadTie((5, 0), (3, 0), ALL), HeadTie((5, 2), (3, 2), ALL))
        return SharingPlan(ties, removed=(*removed, (5, 1)))
    spans = (
        AttentionSpan(0, (3,), "attention", (tuple(reversed(range(heads))),)),
        AttentionSpan(5, (6,), "kv", ((last, *range(last)),)),
    )
    # A follower's values from a layer that has lost a unit.
    ties += (HeadTie((3, 0), (1, 0), ("v",)), HeadTie((6, 0), (4, 1), ("q",)))
    return SharingPlan(ties, removed=removed, spans=spans)


def base(kind: str, shape: str, **fields: Any) -> LlamaForCausalLM:
    return dense(shape, num_hidden_layers=LAYERS + ("spans" in kind), **fields)


@lru_cache
def model_of(kind: str, shape: str = "gqa") -> Any:
    model = use(shared(base(kind, shape), some_plan(kind, shape)))
    model.generation_config.max_new_tokens = 8
    model.generation_config.do_sample = False
    return model


@lru_cache
def expected_of(kind: str, shape: str = "gqa", length: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return Reference.of(base(kind, shape), some_plan(kind, shape))(tokens(2, length)).logits


def stock(kind: str, shape: str) -> LlamaForCausalLM:
    """The stock Llama that a plan without spans is materialized into."""
    plan = some_plan(kind, shape)
    model = copy.deepcopy(convert(base(kind, shape), plan))
    assert type(model) is LlamaForCausalLM
    materialize_(dict(model.named_parameters()), plan.layout(model.config), plan)
    return model.eval()


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(("kind", "shape"), CASES)
@torch.no_grad()
def test_logits_are_those_of_the_definition(
    kind: str, shape: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncompiled(*args: Any, training: bool, **options: Any) -> Any:
        return flex_attention(*args, **options)

    monkeypatch.setattr(library_flex, "compile_friendly_flex_attention", uncompiled)
    expected = expected_of(kind, shape)
    # Removing must matter, or nothing is tested.
    plan = some_plan(kind, shape)
    kept = SharingPlan(plan.ties, plan.kv_heads, spans=plan.spans)
    other = shared(base(kind, shape), kept)(tokens(2, 12)).logits
    assert (other - expected).abs().max() > 1e-2
    for reuse_rows in (0, 16):
        model = use(model_of(kind, shape), implementation, reuse_rows)
        assert (model(tokens(2, 12)).logits - expected).abs().max() <= 1e-5
    use(model_of(kind, shape))


@pytest.mark.parametrize(("kind", "shape"), [case for case in CASES if "spans" not in case[0]])
@torch.no_grad()
def test_a_stock_llama_computes_the_same(kind: str, shape: str) -> None:
    model, plan = stock(kind, shape), some_plan(kind, shape)
    assert (model(tokens(2, 12)).logits - expected_of(kind, shape)).abs().max() <= 1e-5
    assert (model(tokens()).logits - model_of(kind, shape)(tokens()).logits).abs().max() <= 1e-5
    dim, group = model.config.head_dim, plan.layout(model.config).heads_per_unit
    for layer, unit in plan.removed:
        attention = model.model.layers[layer].self_attn
        wide = slice(unit * group * dim, (unit + 1) * group * dim)
        narrow = slice(unit * dim, (unit + 1) * dim)
        assert not attention.q_proj.weight[wide].any()
        assert not attention.k_proj.weight[narrow].any()
        assert not attention.v_proj.weight[narrow].any()
        assert not attention.o_proj.weight[:, wide].any()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_layer_holds_no_more_than_its_units(kind: str, shape: str) -> None:
    """Modules, attention maps and parameters; every parameter gets a gradient."""
    plan, config = some_plan(kind, shape), base(kind, shape).config
    model = use(model_of(kind, shape), "eager")
    out = model(tokens(), output_attentions=True, labels=tokens())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    dim, units = config.head_dim, plan.kv_heads or config.num_key_value_heads
    group = config.num_attention_heads // units
    for at, layer in enumerate(model.model.layers):
        kept = units - sum(removed == at for removed, _ in plan.removed)
        assert out.attentions[at].shape[1] == kept * group
        attention = layer.self_attn
        if not kept:
            assert not [*attention.parameters()]
            assert layer.input_layernorm is None
            continue
        assert attention.o_proj.in_features == kept * group * dim
        assert attention.v_proj.out_features == kept * dim if hasattr(attention, "v_proj") else 1
    assert sum(p.numel() for p in model.parameters()) == plan.savings(config).stored_parameters
    use(model)


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_any_plan(seed: int, tmp_path: Path) -> None:
    """Random ties and removals: in memory and through files."""
    generator = random.Random(seed)
    shape = generator.choice(["mha", "gqa", "odd"])
    units = SHAPES[shape]["num_key_value_heads"]
    removed, ties = [], []
    for layer in range(LAYERS):
        # Some lose all, but not all.
        most = units + (layer > 0)
        removed += [(layer, u) for u in generator.sample(range(units), generator.randrange(most))]
    left = [
        (layer, u) for layer in range(LAYERS) for u in range(units) if (layer, u) not in removed
    ]
    for projection in ALL:
        sources = [unit for unit in left if generator.random() < 0.5] or left[:1]
        for unit in left:
            if unit not in sources and generator.random() < 0.8:
                ties.append(HeadTie(unit, generator.choice(sources), (projection,)))
    plan = SharingPlan(tuple(ties), removed=tuple(removed))
    model = dense(shape, seed)
    with torch.no_grad():
        expected = Reference.of(model, plan)(tokens()).logits
    compact = shared(model, plan)
    assert (compact(tokens()).logits - expected).abs().max() <= 1e-5
    model.save_pretrained(tmp_path / "base")
    result = export_model(
        WeightsFolder(tmp_path / "base"),
        plan,
        tmp_path / "export",
        dtype=torch.float32,
        shard_bytes=20_000,
    )
    for folder in result.paths.values():
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert (loaded(tokens()).logits - expected).abs().max() <= 1e-5
    assert result.bytes["compact"] == 4 * sum(p.numel() for p in compact.parameters())


# --- what it learns -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", ["mha", "gqa", "odd"])
def test_gradients_are_those_of_heads_whose_output_is_multiplied_by_zero(
    shape: str, checkpointing: bool
) -> None:
    plan, model = some_plan("removed", shape), base("removed", shape).train()
    config, units = model.config, SHAPES[shape]["num_key_value_heads"]
    dim, group = config.head_dim, config.num_attention_heads // units
    compact = SharedLlamaForCausalLM.from_materialized(model, plan).train()
    if checkpointing:
        checkpoint_layers(compact)
    compact(tokens(), labels=tokens()).loss.backward()
    found = {name: p.grad.clone() for name, p in compact.named_parameters()}
    for at, layer in enumerate(model.model.layers):
        gate = torch.ones(config.num_attention_heads * dim)
        for removed, unit in plan.removed:
            if removed == at:
                gate[unit * group * dim : (unit + 1) * group * dim] = 0.0
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, g=gate: (args[0] * g,))
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if "self_attn" in name:
            at, p = int(name.split(".")[2]), name.split(".")[4][0]
            size = dim * (group if p in "qo" else 1)
            parts = gradient.split(size, dim=1 if p == "o" else 0)
            assert all(not parts[unit].any() for layer, unit in plan.removed if layer == at)
            kept = [part for unit, part in enumerate(parts) if (at, unit) not in plan.removed]
            gradient = torch.cat(kept, dim=1 if p == "o" else 0)
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "shape"), [("ties", "odd"), ("spans", "gqa"), ("spans", "mha")])
def test_gradients_with_ties_and_spans(kind: str, shape: str, checkpointing: bool) -> None:
    """A stored unit gets the sum over its readers, by autograd through the definition."""
    plan, model = some_plan(kind, shape), base(kind, shape)
    compact = use(shared(model, plan, "copy")).train()
    if checkpointing:
        checkpoint_layers(compact)
    compact(tokens(), use_cache=False).logits.square().mean().backward()
    reference = Reference.of(model, plan, "copy", requires_grad=True)
    reference(tokens()).logits.square().mean().backward()
    own = plan.own_units(plan.layout(model.config))
    for name, parameter in compact.named_parameters():
        expected = reference.weights[name].grad
        where = HeadLayout.parse_name(name)
        if where is not None:
            layer, p = where
            width, axis = plan.layout(model.config).width(p), int(p == "o")
            parts = [expected.narrow(axis, unit * width, width) for unit in own[layer][p]]
            expected = torch.cat(parts, axis) if parts else torch.zeros(parameter.shape)
        torch.testing.assert_close(
            parameter.grad,
            expected.float(),
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# --- the cache ------------------------------------------------------------------------------------


def make_cache(kind: str, model: Any) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=16)
    if kind == "early":  # as transformers allocates it before it compiles the prefill
        cache = StaticCache(config=model.config, max_cache_len=16)
        heads = model.config.num_key_value_heads
        cache.early_initialization(2, heads, model.config.head_dim, torch.float32, "cpu")
        return cache
    return DynamicCache() if kind == "plain" else DynamicCache(config=model.config)


@pytest.mark.parametrize("cache", ["dynamic", "plain", "static", "early"])
@pytest.mark.parametrize(("kind", "shape"), CASES)
@torch.no_grad()
def test_the_cache_holds_what_is_left(kind: str, shape: str, cache: str) -> None:
    plan, config = some_plan(kind, shape), base(kind, shape).config
    for implementation in ("eager", "sdpa"):
        model = use(model_of(kind, shape), implementation, 3)
        held, logits = make_cache(cache, model), []
        for part in tokens(2, 12).split([4, 1, 3, 1, 1, 2], dim=1):
            logits.append(model(part, past_key_values=held, use_cache=True).logits)
        assert (torch.cat(logits, 1) - expected_of(kind, shape)).abs().max() <= 1e-5
        allocated = [
            t for layer in held.layers for t in (layer.keys, layer.values) if t is not None
        ]
        taken = sum(t.untyped_storage().nbytes() for t in allocated)
        length = 16 if cache in ("static", "early") else 12
        assert taken == cache_bytes(plan, config, 2, length, torch.float32)
    use(model)


def test_cache_bytes_by_hand() -> None:
    """Six layers, four KV heads of 4: 32 elements a token and layer, 8 of them a unit's."""
    plan, config = some_plan("removed", "gqa"), dense("gqa").config
    assert cache_bytes(plan, config, 2, 10, torch.bfloat16) == (6 * 32 - 5 * 8) * 20 * 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_cache_of_other_units_is_refused_or_fitted(cache: str) -> None:
    whole, model = dense("gqa"), model_of("removed")
    held = make_cache(cache, whole)
    whole(tokens(2, 4), past_key_values=held)
    with pytest.raises(PostshareError, match=r"layer 1 .* filled by a model with other units"):
        model(tokens(2, 1), past_key_values=held)
    if not reset_empties():
        held = make_cache(cache, whole)
    held.reset()
    logits = model(tokens(2, 12), past_key_values=held).logits
    assert (logits - expected_of("removed")).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["removed", "dropped"])
@torch.no_grad()
def test_layers_of_other_caches_are_left_as_they_are(kind: str) -> None:
    """Of a window that the text does not fill, and in fp8; the first layer may hold nothing."""
    model, ids = model_of(kind), tokens(2, 12)
    sliding = DynamicCache(config=model.config)
    sliding.layers = [DynamicSlidingWindowLayer(32) for _ in range(LAYERS)]
    parts = ids.split([5, 1, 6], dim=1)
    logits = [model(part, past_key_values=sliding, use_cache=True).logits for part in parts]
    assert (torch.cat(logits, 1) - expected_of(kind)).abs().max() <= 1e-5
    assert sliding.get_seq_length() == 12
    if not has_fp8_cache():
        return
    rounded = QuantizedCache("fp8", model.config)
    for part in parts:
        model(part, past_key_values=rounded, use_cache=True)
    assert rounded.get_seq_length() == 12


def greedy(kind: str, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        return Reference.of(base(kind, "gqa"), some_plan(kind, "gqa")).greedy(prompt, 8)


@pytest.mark.parametrize("kind", [*KINDS, "pooled", "dropped, spans"])
def test_generation(kind: str) -> None:
    model, ids = model_of(kind), tokens()[:, -5:]
    stories = [greedy(kind, row) for row in ids.tolist()]
    for options in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 2, "disable_compile": True},
        {"prefill_chunk_size": 2},
    ):
        assert model.generate(ids, **options).tolist() == stories
    assert model.generate(ids[:1], prompt_lookup_num_tokens=3).tolist() == stories[:1]
    # Left padding, and beams.
    padded = torch.zeros(2, 9, dtype=torch.long)
    padded[0, -5:], padded[1, -2:] = ids[0], ids[1, -2:]
    mask = (padded != 0).long()
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        rows = model.generate(padded, attention_mask=mask, **options).tolist()
        assert rows[0][4:] == stories[0]
        assert rows[1][7:] == greedy(kind, ids[1, -2:].tolist())
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    expected = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **beams), expected)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "merge"),
    [
        ("removed", "mha", "bfloat16", "copy"),
        ("removed", "odd", "float32", "copy"),
        ("ties", "mha", "float32", "copy"),
        ("ties", "gqa", "bfloat16", "mean"),
        ("ties", "odd", "float32", "mean"),
        ("pooled", "gqa", "float32", "copy"),
        ("dropped", "mha", "bfloat16", "mean"),
        ("dropped", "gqa", "float32", "copy"),
        ("dropped", "odd", "bfloat16", "copy"),
        ("dropped", "mqa", "float32", "copy"),
    ],
)
def test_materialized_is_exported_is_loaded(
    tmp_path: Path, kind: str, shape: str, dtype: str, merge: Any
) -> None:
    plan, element = some_plan(kind, shape), getattr(torch, dtype)
    model = base(kind, shape)
    model.save_pretrained(tmp_path / "base")
    source = WeightsFolder(tmp_path / "base")
    options = {"dtype": element, "shard_bytes": 30_000, "merge": merge}
    result = export_model(source, plan, tmp_path / "export", **options)
    expected = copy.deepcopy(convert(model, plan))
    materialize_(dict(expected.named_parameters()), plan.layout(expected.config), plan, merge)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(element)
    loaded, info = {}, {}
    for what, folder in result.paths.items():
        loaded[what], info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
    assert [type(m) for m in loaded.values()] == [SharedLlamaForCausalLM, LlamaForCausalLM]
    weights = dict(expected.named_parameters())
    expanded = ExpandedFolder(result.paths["compact"])
    for name, parameter in loaded["dense"].named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(expanded.read(name), parameter)
        where = HeadLayout.parse_name(name)
        if where is not None:  # slices that begin and end in removed units
            features = parameter.shape[int(where[1] == "o")]
            for start, stop in ((0, features // 2), (features // 3, features)):
                key = (slice(None), slice(start, stop)) if where[1] == "o" else slice(start, stop)
                assert torch.equal(expanded.slice(name)[key], parameter[key])
    with torch.no_grad():
        logits = [m.float()(tokens()).logits for m in (expected, *loaded.values())]
    assert (logits[1] - logits[0]).abs().max() <= 1e-5
    assert (logits[2] - logits[0]).abs().max() <= 1e-5

    savings = plan.savings(source.config)
    stored = sum(p.numel() for p in loaded["compact"].parameters())
    assert stored == savings.stored_parameters
    assert result.bytes["compact"] == stored * element.itemsize
    assert result.bytes["dense"] == sum(p.numel() for p in weights.values()) * element.itemsize
    manifest = json.loads((result.paths["compact"] / "manifest.json").read_text())
    heads = plan.layout(source.config).heads_per_unit * len(plan.removed)
    assert manifest["heads"]["removed"] == heads
    assert manifest["plan"] == plan.to_dict()
    config = json.loads((result.paths["compact"] / "config.json").read_text())
    assert config["sharing"]["removed"] == [list(unit) for unit in plan.removed]
    card = (result.paths["dense"] / "README.md").read_text()
    assert f"| attention heads removed | {heads} of {savings.heads} |" in card

    again = export_model(
        expanded, plan, tmp_path / "again", dtype=element, shard_bytes=10**6, formats=["compact"]
    )
    verify_equal(ExpandedFolder(again.paths["compact"]), WeightsFolder(result.paths["dense"]))


def test_a_plan_with_spans_is_exported_compact(tmp_path: Path) -> None:
    """The verification runs each layer, those with other units than the layers they read too."""
    for kind, shape in (("spans", "mha"), ("spans", "odd"), ("dropped, spans", "gqa")):
        base(kind, shape).save_pretrained(tmp_path / shape)
        source, plan = WeightsFolder(tmp_path / shape), some_plan(kind, shape)
        result = export_model(
            source,
            plan,
            tmp_path / f"{shape}-export",
            dtype=torch.float32,
            shard_bytes=10**6,
            formats=["compact"],
        )
        loaded = AutoModelForCausalLM.from_pretrained(result.paths["compact"])
        with torch.no_grad():
            logits = loaded(tokens(2, 12)).logits
        assert (logits - expected_of(kind, shape)).abs().max() <= 1e-5


def test_a_damaged_export_is_not_taken(tmp_path: Path) -> None:
    """A dense form whose removed unit is not zero is not what the compact form says."""
    base("ties", "gqa").save_pretrained(tmp_path / "base")
    source, plan = WeightsFolder(tmp_path / "base"), some_plan("ties", "gqa")
    result = export_model(source, plan, tmp_path / "export", dtype=torch.float32, shard_bytes=10**6)
    model = LlamaForCausalLM.from_pretrained(result.paths["dense"])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8] = 1e-6
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(PostshareError, match=r"layers\.1\.self_attn\.o_proj.*differs"):
        verify_equal(ExpandedFolder(result.paths["compact"]), WeightsFolder(tmp_path / "other"))


def test_a_model_without_units_cannot_be_converted() -> None:
    with pytest.raises(PostshareError, match="no removed ones"):
        convert(model_of("removed"), SharingPlan(spans=(AttentionSpan(0, (3,)),)))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("stories260K", "units"),
        ("stories260K-mha", "units"),
        ("mixed7M", "units"),
        ("stories260K", "layers"),
        pytest.param("stories260K-mha", "layers", marks=pytest.mark.more),
        pytest.param("mixed7M", "layers", marks=pytest.mark.more),
    ],
)
@torch.no_grad()
def test_real_checkpoints(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    source = WeightsFolder(shared / "models" / name)
    layout = HeadLayout.from_config(source.config)
    plan = SharingPlan(
        (
            HeadTie((2, 0), (1, 1), ALL),
            HeadTie((4, 1), (0, layout.units - 1), ("q", "k", "v")),
            HeadTie((4, 2), (3, 1), ("o",)),
        ),
        removed=((0, 0), (1, 0), (1, 2), (2, 1), (2, 2), (3, 0), (4, 3)),
    )
    if what == "layers":
        gone = (0, 3, layout.layers - 1)
        plan = SharingPlan(
            (HeadTie((2, 0), (1, 1), ALL),),
            removed=((1, 0), *((layer, unit) for layer in gone for unit in range(layout.units))),
        )
    result = export_model(source, plan, tmp_path / "export", dtype=torch.float32, shard_bytes=10**8)
    model = LlamaForCausalLM.from_pretrained(source.path, dtype=torch.float32).double().eval()
    size = min(512, source.config.vocab_size)
    text = torch.from_numpy(np.load(shared / "golden" / "input_ids.npy")) % size
    before = model(text).logits
    # By slices: ties, then heads whose columns of o are zero.
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    for tie in plan.ties:
        for p in tie.projections:
            rows = layout.width(p)
            mine = slice(tie.target[1] * rows, (tie.target[1] + 1) * rows)
            other = slice(tie.source[1] * rows, (tie.source[1] + 1) * rows)
            target = model.get_parameter(layout.parameter_name(tie.target[0], p))
            origin = weights[layout.parameter_name(tie.source[0], p)]
            if p == "o":
                target[:, mine] = origin[:, other]
            else:
                target[mine] = origin[other]
    for layer, unit in plan.removed:
        columns = layout.width("o")
        model.model.layers[layer].self_attn.o_proj.weight[
            :, unit * columns : (unit + 1) * columns
        ] = 0
    expected = model(text).logits
    assert (expected - before).abs().max() > 1e-1
    for folder in result.paths.values():
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert (loaded.double().eval()(text).logits - expected).abs().max() <= 1e-9


# --- the plan -------------------------------------------------------------------------------------


def test_savings_of_a_gqa_plan_by_hand() -> None:
    """Eight heads of 4 in four KV groups, hidden 32: a unit holds 8 rows of q, 4 of k, 4 of v."""
    config = dense("gqa").config
    plan = SharingPlan((HeadTie((2, 0), (0, 0), ("v", "o")),), removed=((1, 1), (1, 3), (4, 0)))
    plan.validate(config)
    savings = plan.savings(config)
    assert (savings.removed_units, savings.removed_heads) == (3, 6)
    assert (savings.tied_units, savings.tied_heads) == (1, 2)
    assert savings.effective_ratio == 4 / 24
    gone = 3 * (8 + 4 + 4 + 8) * 32
    assert savings.removed_unit_parameters == gone
    assert savings.base_parameters - savings.stored_parameters == gone + (4 + 8) * 32
    assert savings.dense_parameters == savings.base_parameters
    assert savings.stored_cache == 6 * 32 - 3 * 8
    layout = plan.layout(config)
    assert plan.kept_units(layout)[1] == [0, 2]
    assert plan.own_units(layout)[1] == {p: [0, 2] for p in "qkvo"}
    assert plan.own_units(layout)[2] == {
        "q": [0, 1, 2, 3],
        "k": [0, 1, 2, 3],
        "v": [1, 2, 3],
        "o": [1, 2, 3],
    }


def test_units_are_those_of_the_pooled_model() -> None:
    """Two KV groups of four heads are left of four groups of two."""
    config = dense("gqa").config
    plan = SharingPlan(kv_heads=2, removed=((1, 1),))
    savings = plan.savings(config)
    assert savings.removed_heads == 4
    assert savings.removed_unit_parameters == (16 + 4 + 4 + 16) * 32
    assert savings.dense_parameters == savings.base_parameters - 6 * 2 * 2 * 4 * 32
    with pytest.raises(PostshareError, match="2 units"):
        SharingPlan(kv_heads=2, removed=((1, 3),)).validate(config)


def test_json_round_trip_and_hash(tmp_path: Path) -> None:
    plan = some_plan("spans", "gqa")
    plan.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == plan
    fewer = SharingPlan(plan.ties, removed=plan.removed[:-1], spans=plan.spans)
    assert fewer.hash() != plan.hash()
    assert plan.structure() == SharingPlan(spans=plan.spans)
    assert plan.effective() is plan


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ([(6, 0)], "removed [6, 0]: the layer 6 is out of range; the model has layers 0 to 5"),
        ([(1, 4)], "removed [1, 4]: the unit 4 is out of range"),
        ([(1, 0), (1, 2), (1, 0)], "removed [1, 0]: the unit is named 2 times"),
        ([(2, 0)], "removed [2, 0]: the unit is the target of 'tie [2, 0] <- [0, 1] (qk)'"),
        ([(1, 0), (0, 1)], "removed [0, 1]: the unit is the source of 'tie [2, 0] <- [0, 1] (qk)'"),
        ([(4, 1)], "removed [4, 1]: layer 4 is in 'span 4 -> [5] (attention)'"),
        ([(5, 1)], "removed [5, 1]: layer 5 is in 'span 4 -> [5] (attention)'"),
        ([(4, unit) for unit in range(4)], "removed [4, 0]: layer 4 is in 'span 4 -> [5]"),
    ],
)
def test_a_wrong_unit_is_named(removed: list[tuple[int, int]], says: str) -> None:
    plan = SharingPlan(
        (HeadTie((2, 0), (0, 1), ("q", "k")),),
        removed=tuple(removed),
        spans=(AttentionSpan(4, (5,)),),
    )
    with pytest.raises(PostshareError) as error:
        plan.validate(dense("gqa").config)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_savings_of_dropped_layers_by_hand() -> None:
    """Two layers of four units of 24 rows, with a norm of 32 before them, and a unit of another."""
    config = dense("gqa").config
    plan = SharingPlan(removed=((1, 1), *((layer, unit) for layer in (0, 4) for unit in range(4))))
    plan.validate(config)
    savings, layout = plan.savings(config), plan.layout(config)
    assert plan.dropped(layout) == {0, 4}
    assert (savings.removed_units, savings.removed_heads, savings.dropped_layers) == (9, 18, 2)
    assert savings.base_parameters - savings.stored_parameters == 9 * 24 * 32 + 2 * 32
    assert savings.stored_ratio == 9 / 24
    assert savings.dense_parameters == savings.base_parameters
    assert savings.stored_cache == 6 * 32 - 9 * 8
    assert plan.own_units(layout)[4] == {}
    assert len(plan.dropped_names(layout)) == 10


def test_a_layer_of_one_unit_may_go_but_not_all_layers() -> None:
    SharingPlan(removed=((2, 0),)).validate(dense("mqa").config)
    SharingPlan(kv_heads=1, removed=((2, 0),)).validate(dense("gqa").config)
    every = tuple((layer, 0) for layer in range(6))
    with pytest.raises(PostshareError, match="all 6 layers would lose all their units"):
        SharingPlan(removed=every).validate(dense("mqa").config)


def test_a_malformed_unit_is_named() -> None:
    with pytest.raises(PostshareError, match=r"plan\.removed\[1\] is \[1\]"):
        SharingPlan.from_dict({"version": 1, "removed": [[0, 1], [1]]})
