"""Converting a dense Llama: pooled heads, leaders, dropped projections; streaming and in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models import AttentionSpan, HeadTie, PostshareError, SharedLlamaForCausalLM, SharingPlan
from sa_models.heads import HeadLayout
from sa_models.weights.compact_folder import ExpandedFolder
from sa_models.weights.safetensors_folder import WeightsFolder
from sa_models.weights.structure import ConvertedReader, convert, converted
from tests.support.reference import (
    LAYERS,
    PLANS,
    SHAPES,
    SPAN_PLANS,
    Reference,
    dense,
    some_plan,
    tokens,
)
from tests.support.reference import shared as shared_model


def in_dtype(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    for parameter in model.parameters():  # not .to(): that rounds the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return model


def weight(model: Any, layer: int, p: str) -> torch.Tensor:
    return model.get_parameter(f"model.layers.{layer}.self_attn.{p}_proj.weight").detach()


# --- what the definitions say ---------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pooled_heads_are_means(kv_heads: int) -> None:
    base = dense("mha")
    model = convert(base, SharingPlan(kv_heads=kv_heads))
    if kv_heads == 4:
        assert model is base
        return
    assert type(model) is LlamaForCausalLM
    assert model.config.num_key_value_heads == kv_heads
    assert base.config.num_key_value_heads == 4
    group, size = 4 // kv_heads, 6
    for layer in range(LAYERS):
        for p in "kv":
            heads = weight(base, layer, p).double().split(size)
            for head, pooled in enumerate(weight(model, layer, p).split(size)):
                mean = sum(heads[head * group : (head + 1) * group]) / group
                torch.testing.assert_close(pooled.double(), mean, rtol=1e-6, atol=1e-8)
        for p in "qo":
            assert torch.equal(weight(model, layer, p), weight(base, layer, p))


def test_equal_heads_are_pooled_without_a_loss(shared: Path) -> None:
    """The MHA checkpoint has every KV head of the GQA checkpoint twice (golden README)."""
    base = LlamaForCausalLM.from_pretrained(shared / "models" / "stories260K-mha")
    expected = LlamaForCausalLM.from_pretrained(shared / "models" / "stories260K")
    model = convert(base, SharingPlan(kv_heads=4))
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("leaders", ["mean", "copy"])
def test_the_leader_of_keys_and_values(leaders: Literal["mean", "copy"]) -> None:
    base = dense()
    plan = SharingPlan(spans=(AttentionSpan(1, (2, 4), "kv"), AttentionSpan(0, (3,))))
    model = convert(base, plan, leaders)
    for p in "kv":
        served = [weight(base, layer, p).double() for layer in (1, 2, 4)]
        expected = sum(served) / 3 if leaders == "mean" else served[0]
        torch.testing.assert_close(weight(model, 1, p).double(), expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(weight(model, 0, p), weight(base, 0, p))
    assert torch.equal(weight(model, 1, "q"), weight(base, 1, "q"))


@torch.no_grad()
def test_a_leader_and_pooled_heads_at_once() -> None:
    base, plan = dense("mha"), SharingPlan(kv_heads=2, spans=(AttentionSpan(0, (1, 2), "kv"),))
    for leaders in ("mean", "copy"):
        served = (0, 1, 2) if leaders == "mean" else (0,)
        model = convert(base, plan, leaders)
        rows = [weight(base, layer, "v").double().split(6) for layer in served]
        for head, pooled in enumerate(weight(model, 0, "v").split(6)):
            mean = sum(r[2 * head] + r[2 * head + 1] for r in rows) / (2 * len(served))
            torch.testing.assert_close(pooled.double(), mean, rtol=1e-6, atol=1e-8)
        expected = Reference.of(base, plan, leaders)(tokens()).logits
        assert (model(tokens()).logits - expected).abs().max() <= 1e-5


# --- what the model holds -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_absent_projections_exist_nowhere(kind: str, tmp_path: Path) -> None:
    plan = some_plan(kind, "gqa")
    base = dense()
    base.save_pretrained(tmp_path / "base")
    model = convert(base, plan)
    absent = {
        f"model.layers.{follower}.self_attn.{p}_proj"
        for span in plan.spans
        for follower in span.followers
        for p in ("qk" if span.share == "attention" else "kv")
    }
    assert not absent & dict(model.named_modules()).keys()
    assert not {f"{name}.weight" for name in absent} & model.state_dict().keys()
    expected = {name for name, _ in base.named_parameters()} - {f"{n}.weight" for n in absent}
    assert {name for name, _ in model.named_parameters()} == expected
    reader = ConvertedReader(WeightsFolder(tmp_path / "base"), plan)
    assert set(reader.names()) == expected
    model.save_pretrained(tmp_path / "converted")
    assert set(ExpandedFolder(tmp_path / "converted").names()) == expected


@pytest.mark.parametrize("kind", PLANS)
def test_parameters_that_stay_are_shared(kind: str) -> None:
    base, plan = dense(), some_plan(kind, "gqa")
    before = copy.deepcopy(base.state_dict())
    logits = base(tokens()).logits
    model = convert(base, plan)
    made = {
        HeadLayout.parameter_name(layer, p)
        for layer in range(LAYERS)
        for p in "kv"
        if plan.kv_heads or any(s.share == "kv" and s.leader == layer for s in plan.spans)
    }
    theirs = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter is theirs[name]) == (name not in made), name
        assert parameter.is_leaf
        assert parameter.requires_grad
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert (base(tokens()).logits - logits).abs().max() <= 1e-6


def test_tied_embeddings_stay_tied() -> None:
    model = convert(dense("odd"), some_plan("both", "odd"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_mode_frozen_parameters_and_generation_config_are_kept() -> None:
    base = dense().train()
    base.generation_config.top_k = 7
    base.model.embed_tokens.requires_grad_(False)
    base.model.layers[2].self_attn.k_proj.requires_grad_(False)
    for plan in (some_plan("cla", "gqa"), SharingPlan(kv_heads=2)):
        model = convert(base, plan)
        assert model.training
        assert model.generation_config.top_k == 7
        assert not model.model.embed_tokens.weight.requires_grad
        assert not model.model.layers[2].self_attn.k_proj.weight.requires_grad
        assert model.model.layers[0].self_attn.k_proj.weight.requires_grad
        assert model.config._attn_implementation == base.config._attn_implementation


def test_nothing_to_convert() -> None:
    base = dense()
    ties = SharingPlan((HeadTie((1, 0), (0, 0), ("q",)),))
    for plan in (SharingPlan(), ties, SharingPlan(kv_heads=4)):
        assert convert(base, plan) is base


@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_a_converted_model_is_not_converted_again(kind: str) -> None:
    plan = some_plan(kind, "gqa")
    model = convert(dense(), plan)
    assert convert(model, plan) is model
    other = SharingPlan(spans=(AttentionSpan(0, (5,)),))
    for wrong in (other, SharingPlan(), SharingPlan(kv_heads=1, spans=plan.spans)):
        with pytest.raises(PostshareError, match="other spans or other KV heads"):
            convert(model, wrong)


def test_a_model_with_ties_is_not_converted() -> None:
    base, ties = dense(), SharingPlan((HeadTie((1, 0), (0, 0), ("q",)),))
    tied = shared_model(base, ties)
    assert convert(tied, ties) is tied
    for plan in (some_plan("sa", "gqa"), SharingPlan(kv_heads=2)):
        with pytest.raises(PostshareError, match="convert it before its units are tied"):
            convert(tied, plan)


def test_the_compact_form_of_a_model_that_was_not_converted() -> None:
    """It would keep the leaders' own keys and values, whatever the plan says."""
    base = dense()
    for plan in (some_plan("sa", "gqa"), some_plan("cla", "gqa"), SharingPlan(kv_heads=2)):
        with pytest.raises(PostshareError, match="convert it first"):
            SharedLlamaForCausalLM.from_materialized(base, plan)
    with pytest.raises(PostshareError, match="convert it first"):
        SharedLlamaForCausalLM.from_materialized(convert(base, plan), some_plan("sa", "gqa"))


def test_a_plan_that_does_not_fit() -> None:
    for plan, says in (
        (SharingPlan(spans=(AttentionSpan(4, (6,)),)), "layer 6 is out of range"),
        (SharingPlan(kv_heads=3), "does not divide"),
    ):
        with pytest.raises(PostshareError, match=says):
            convert(dense(), plan)


@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_the_state_dict_makes_a_round_trip(kind: str, tmp_path: Path) -> None:
    model = convert(dense("odd"), some_plan(kind, "odd"))
    assert isinstance(model, SharedLlamaForCausalLM)
    expected = model(tokens()).logits
    fresh = SharedLlamaForCausalLM(model.config).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(tokens()).logits, expected)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is SharedLlamaForCausalLM
    assert loaded.config.plan == some_plan(kind, "odd").structure()
    assert torch.equal(loaded.eval()(tokens()).logits, expected)


def test_the_dense_model_can_still_be_saved(tmp_path: Path) -> None:
    """Its o is stored transposed now, as that of the converted model."""
    base = dense()
    before = copy.deepcopy(base.state_dict())
    convert(base, some_plan("both", "gqa"))
    base.save_pretrained(tmp_path)
    for name, tensor in WeightsFolder(tmp_path).items():
        assert torch.equal(tensor, before[name]), name


# --- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leaders", ["mean", "copy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_equals_in_memory(
    shape: str, leaders: Literal["mean", "copy"], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = in_dtype(dense(shape), dtype)
    base.save_pretrained(tmp_path, max_shard_size=5000)
    for kind in PLANS:
        plan = some_plan(kind, shape)
        model = convert(base, plan, leaders)
        reader = converted(WeightsFolder(tmp_path), plan, leaders)
        parameters = dict(model.named_parameters())
        assert set(reader.names()) == parameters.keys()
        for name, parameter in parameters.items():
            tensor = reader.read(name)
            assert tensor.dtype == dtype
            assert reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(tensor, parameter), name
            assert torch.equal(reader.slice(name)[2:5], tensor[2:5])


def test_a_mean_in_bfloat16_is_rounded_once() -> None:
    base = in_dtype(dense("mha"), torch.bfloat16)
    plan = SharingPlan(kv_heads=1, spans=(AttentionSpan(0, (1, 2, 3, 4), "kv"),))
    model = convert(base, plan)
    heads = [h for layer in range(5) for h in weight(base, layer, "k").double().split(6)]
    mean = torch.stack(heads).mean(0)
    assert torch.equal(weight(model, 0, "k"), mean.float().bfloat16())


@pytest.mark.parametrize("kind", SPAN_PLANS)
def test_a_folder_that_was_trained_with_the_plan(kind: str, tmp_path: Path) -> None:
    plan = some_plan(kind, "gqa")
    convert(dense(), plan).save_pretrained(tmp_path)
    folder = ExpandedFolder(tmp_path)
    assert converted(folder, plan) is folder
    other = SharingPlan(spans=(AttentionSpan(0, (5,)),))
    for wrong in (other, SharingPlan(), SharingPlan(kv_heads=1, spans=plan.spans)):
        with pytest.raises(PostshareError, match="other spans or other KV heads"):
            converted(folder, wrong)
