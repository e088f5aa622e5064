"""The definitions of SA, CLA and GQA, without a cache: logits, masks, gradients, compiling."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaForCausalLM, StaticCache
from transformers.integrations import flex_attention as library_flex
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sa_models import AttentionSpan, PostshareError, SharingPlan
from sa_models.attention import attention_weights, mix_values
from tests.support.reference import (
    PLANS,
    SHAPES,
    SPAN_PLANS,
    Outputs,
    Reference,
    dense,
    exact_norm,
    some_plan,
    tokens,
    use,
)
from tests.support.reference import shared as compact_of
from tests.support.transformers_versions import checkpoint_layers, keep_activations

MODES = [0, 16]
"""``reuse_rows``: replay, and reuse of the attention weights."""


@lru_cache
def model_of(shape: str, kind: str) -> Any:
    return compact_of(dense(shape), some_plan(kind, shape))


@lru_cache
def expected_of(shape: str, kind: str) -> Outputs:
    with torch.no_grad():
        return Reference.of(dense(shape), some_plan(kind, shape))(tokens())


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_stock_llama_without_a_plan(shape: str) -> None:
    model = dense(shape)
    expected = Reference.of(model, SharingPlan())(tokens())
    assert difference(model(tokens()).logits, expected.logits) <= 1e-5


def test_every_plan_changes_the_logits() -> None:
    """So that equality below says something: also a head map does."""
    plain = Reference.of(dense("gqa"), SharingPlan())(tokens()).logits
    for kind in PLANS:
        assert difference(expected_of("gqa", kind).logits, plain) > 0.1
    for share in ("attention", "kv"):
        heads = 8 if share == "attention" else 4
        maps = (None, (tuple(range(heads))[::-1],), ((0,) * heads,))
        plans = [SharingPlan(spans=(AttentionSpan(1, (2,), share, m),)) for m in maps]
        one, two, three = (Reference.of(dense("gqa"), p)(tokens()).logits for p in plans)
        assert min(difference(one, two), difference(one, three), difference(two, three)) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_the_definition(shape: str, kind: str, implementation: str) -> None:
    model, expected = model_of(shape, kind), expected_of(shape, kind).logits
    for reuse_rows in MODES:
        computed = use(model, implementation, reuse_rows)(tokens()).logits
        assert difference(computed, expected) <= 1e-5
        computed = model(tokens(), use_cache=False).logits
        assert difference(computed, expected) <= 1e-5


@pytest.mark.parametrize("kind", PLANS)
@torch.no_grad()
def test_logits_in_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fp32 cannot tell apart; the softmax of reuse (and of eager) is in fp32 by design."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model = compact_of(dense("odd"), some_plan(kind, "odd")).double()
    expected = expected_of("odd", kind).logits
    bound = 1e-6 if "pooled" in kind or "cla" in kind or "both" in kind else 1e-10  # fp32 means
    assert difference(use(model, "sdpa", 0)(tokens()).logits, expected) <= bound
    assert difference(use(model, "sdpa", 16)(tokens()).logits, expected) <= 1e-6


@pytest.mark.parametrize("model", ["stories260K", "stories260K-mha", "mixed7M"])
@torch.no_grad()
def test_real_checkpoints_in_float64(
    shared: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Logits reach 23 here, where fp32 says little; the means of leaders are rounded to fp32."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    base = LlamaForCausalLM.from_pretrained(shared / "models" / model).eval()
    last = base.config.num_hidden_layers - 1
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    for share, bound in (("attention", 1e-6), ("kv", 1e-4)):
        plan = SharingPlan(spans=(AttentionSpan(1, (2, last), share),))
        expected = Reference.of(base, plan)(ids).logits
        computed = use(compact_of(base, plan)).double()(ids).logits
        assert difference(computed, expected) <= bound


@pytest.mark.more  # compiled: a quarter of a minute each
@pytest.mark.parametrize("shape", ["gqa", "odd"])
@torch.no_grad()
def test_flex_attention(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own arithmetic; compiling the kernel, as the library does, takes a minute on a CPU."""

    def uncompiled(*args: Any, training: bool, **options: Any) -> Any:
        return flex_attention(*args, **options)

    monkeypatch.setattr(library_flex, "compile_friendly_flex_attention", uncompiled)
    for kind in ("sa interleaved, mapped", "both"):
        model = use(compact_of(dense(shape), some_plan(kind, shape)), "flex_attention")
        assert difference(model(tokens()).logits, expected_of(shape, kind).logits) <= 1e-5


@pytest.mark.parametrize("kind", SPAN_PLANS)
@torch.no_grad()
def test_hidden_states_and_attention_maps(kind: str) -> None:
    expected = expected_of("gqa", kind)
    for reuse_rows in MODES:
        model = use(model_of("gqa", kind), "eager", reuse_rows)
        out = model(tokens(), output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == len(expected.hidden)
        for ours, theirs in zip(out.hidden_states, expected.hidden, strict=True):
            assert difference(ours, theirs) <= 1e-5
        assert len(out.attentions) == len(expected.maps)
        for ours, theirs in zip(out.attentions, expected.maps, strict=True):
            assert difference(ours, theirs) <= 1e-6


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["sa interleaved, mapped", "cla mapped", "pooled, both"])
@torch.no_grad()
def test_padding(kind: str, side: str) -> None:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = tokens(3)
    expected = Reference.of(dense("gqa"), some_plan(kind, "gqa"))(ids, mask, positions).logits
    model = model_of("gqa", kind)
    for implementation in ("eager", "sdpa"):
        for reuse_rows in MODES:
            computed = use(model, implementation, reuse_rows)(
                ids, attention_mask=mask, position_ids=positions
            )
            assert difference(computed.logits[mask == 1], expected[mask == 1]) <= 1e-5


@pytest.mark.parametrize("kind", ["sa interleaved, mapped", "cla mapped", "pooled, both"])
@torch.no_grad()
def test_packed_documents_see_themselves_alone(kind: str) -> None:
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 1 + [2] * 6])
    positions = torch.tensor([[*range(4), *range(5)], [*range(2), 0, *range(6)]])
    reference = Reference.of(dense("gqa"), some_plan(kind, "gqa"))
    expected = reference(tokens(), None, positions, documents).logits
    alone = reference(tokens()[:1, 4:]).logits
    assert difference(expected[:1, 4:], alone) <= 1e-9
    model = model_of("gqa", kind)
    for implementation in ("eager", "sdpa"):
        for reuse_rows in MODES:
            computed = use(model, implementation, reuse_rows)(
                tokens(), position_ids=positions, use_cache=False
            )
            assert difference(computed.logits, expected) <= 1e-5


@torch.no_grad()
def test_a_mask_of_the_caller() -> None:
    """Four dimensions, bool (sdpa) or added (eager): here a window of three tokens."""
    allowed = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)[None, None].expand(2, 1, 9, 9)
    added = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for kind in ("sa interleaved, mapped", "both"):
        results = [
            use(model_of("gqa", kind), implementation, rows)(tokens(), attention_mask=mask).logits
            for implementation, mask in (("sdpa", allowed), ("sdpa", added), ("eager", added))
            for rows in MODES
        ]
        assert difference(results[0], expected_of("gqa", kind).logits) > 0.01
        for other in results[1:]:
            assert difference(other, results[0]) <= 1e-5


def test_the_mask_of_flash_attention_for_one_row() -> None:
    """(rows, keys) of 0 and 1, shorter than a static cache: what lies behind it is not seen."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 1, 6), torch.randn(2, 2, 8, 6), torch.randn(2, 2, 8, 6)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    output = mix_values(attention_weights(query, key, mask, 0.5), value)
    for row, first in ((0, 1), (1, 0)):
        for head in range(4):
            seen = key[row, head // 2, first:5]
            weights = (seen @ query[row, head, 0] * 0.5).softmax(0)
            expected = weights @ value[row, head // 2, first:5]
            torch.testing.assert_close(output[row, 0, head], expected)


# --- gradients ------------------------------------------------------------------------------------


def gradients(model: LlamaForCausalLM, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    model(tokens(), labels=tokens(), **options).loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["sa", "sa interleaved, mapped", "cla mapped", "both"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_are_those_of_the_definition(kind: str, implementation: str) -> None:
    """Also of the leader's projections, through its followers; with checkpointing and without."""
    model = dense("gqa")
    reference = Reference.of(model, some_plan(kind, "gqa"), "copy", requires_grad=True)
    logits = reference(tokens()).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()
    )
    loss.backward()
    compact = compact_of(model, some_plan(kind, "gqa"), "copy")
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(compact)
        for reuse_rows in MODES:
            computed = gradients(use(compact, implementation, reuse_rows), use_cache=False)
            for name, weight in reference.weights.items():
                if name in computed:
                    torch.testing.assert_close(
                        computed[name].double(), weight.grad, rtol=1e-4, atol=1e-6, msg=name
                    )
                else:  # a projection that a follower does not have
                    assert weight.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", ["attention", "kv"])
def test_the_leader_learns_from_its_followers(share: str, checkpointing: bool) -> None:
    """With its own o_proj at zero nothing else is left to learn from."""
    model = compact_of(dense("gqa"), SharingPlan(spans=(AttentionSpan(1, (2, 4), share),)))
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    if checkpointing:
        checkpoint_layers(model)
    for reuse_rows in MODES:
        computed = gradients(use(model, "sdpa", reuse_rows), use_cache=False)
        for p in "qk" if share == "attention" else "kv":
            assert computed[f"model.layers.1.self_attn.{p}_proj.weight"].abs().max() > 1e-5


@pytest.mark.parametrize("kind", PLANS)
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    model = compact_of(dense("gqa"), some_plan(kind, "gqa"))
    for reuse_rows in MODES:
        plain = gradients(use(model, "sdpa", reuse_rows), use_cache=False)
        checkpoint_layers(model)
        again = gradients(model)  # checkpointing switches the cache off
        keep_activations(model)
        for name, gradient in plain.items():
            assert torch.equal(again[name], gradient), name


def test_reentrant_checkpointing_is_refused() -> None:
    """It would cut the leader off its followers without a word."""
    model = compact_of(dense("gqa"), some_plan("sa", "gqa"))
    checkpoint_layers(model, use_reentrant=True)
    for reuse_rows in MODES:
        with pytest.raises(PostshareError, match="'use_reentrant': False"):
            gradients(use(model, "sdpa", reuse_rows))


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_parameter_is_idle(shape: str, kind: str) -> None:
    """One without a gradient stops DDP, and breaks the resume of an optimizer."""
    computed = gradients(use(compact_of(dense(shape), some_plan(kind, shape))))
    for name, gradient in computed.items():
        assert gradient is not None, name
        assert gradient.numel() == 0 or gradient.abs().max() > 0, name


# --- dtypes, compiling ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANS)
@torch.no_grad()
def test_bfloat16_is_close(kind: str) -> None:
    model = compact_of(dense("gqa"), some_plan(kind, "gqa"))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = expected_of("gqa", kind).logits
    for implementation in ("eager", "sdpa"):
        for reuse_rows in MODES:
            computed = use(model, implementation, reuse_rows)(tokens()).logits
            assert computed.dtype == torch.bfloat16
            assert difference(computed, expected) <= 0.05 * float(expected.abs().max())


def test_autocast_trains() -> None:
    model = compact_of(dense("gqa"), some_plan("both, ties", "gqa"))
    expected = gradients(use(model))
    for reuse_rows in MODES:
        with torch.autocast("cpu", torch.bfloat16):
            computed = gradients(use(model, "sdpa", reuse_rows))
        for name, gradient in computed.items():
            scale = float(expected[name].abs().max()) if expected[name].numel() else 1.0
            assert gradient.numel() == 0 or difference(gradient, expected[name]) <= 0.1 * scale


@pytest.mark.parametrize(("kind", "reuse_rows"), [("both", 0), ("both, ties", 16)])
@torch.no_grad()
def test_compiling_the_whole_model(kind: str, reuse_rows: int) -> None:
    model = use(compact_of(dense("gqa"), some_plan(kind, "gqa")), "sdpa", reuse_rows)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = compiled(tokens(), use_cache=False).logits
    assert difference(logits, expected_of("gqa", kind).logits) <= 1e-5
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_decoding_into_a_static_cache() -> None:
    """Prefill as it is, then every token through one graph."""
    expected = expected_of("gqa", "both").logits
    model = use(compact_of(dense("gqa"), some_plan("both", "gqa")))
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = [model(tokens()[:, :4], past_key_values=cache).logits]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits += [compiled(tokens()[:, i : i + 1], past_key_values=cache).logits for i in range(4, 9)]
    assert difference(torch.cat(logits, 1), expected) <= 1e-5
    torch._dynamo.reset()


def test_compiled_training_of_the_layers() -> None:
    model = compact_of(dense("gqa"), some_plan("both", "gqa"))
    plain = gradients(use(model, "sdpa", 0), use_cache=False)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    again = gradients(model, use_cache=False)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch._dynamo.reset()
