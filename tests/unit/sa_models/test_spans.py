"""Plans with spans and pooled KV heads: arithmetic, JSON, and every error that a wrong one gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from sa_models import AttentionSpan, HeadTie, PostshareError, SharingPlan
from sa_models.configuration import SharedLlamaConfig
from sa_models.modeling import compact_config
from tests.support.reference import PLANS, SHAPES, dense, shared, some_plan, tokens, use


def config(**fields: Any) -> LlamaConfig:
    """Six layers of 8 heads in 4 KV groups."""
    shape = {"num_hidden_layers": 6, "vocab_size": 40, "intermediate_size": 20}
    return LlamaConfig(**(shape | SHAPES["gqa"] | fields))


def plan(*spans: AttentionSpan, **fields: Any) -> SharingPlan:
    return SharingPlan(spans=spans, **fields)


# --- what is saved --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_savings_are_those_of_real_models_and_caches(shape: str, kind: str) -> None:
    base, sharing = dense(shape), some_plan(kind, shape)
    model = use(shared(base, sharing))
    savings = sharing.savings(base.config)
    count = sum(p.numel() for p in base.parameters())
    stored = sum(p.numel() for p in model.parameters())
    assert savings.base_parameters == count
    assert savings.stored_parameters == stored
    assert savings.bytes(2) == (2 * count, 2 * stored)
    attention = sum(p.numel() for n, p in base.named_parameters() if "self_attn" in n)
    assert savings.stored_ratio == pytest.approx((count - stored) / attention)
    assert savings.stored_cache * 18 == cached_elements(model)
    assert savings.base_cache * 18 == cached_elements(base)
    assert savings.cache_ratio == pytest.approx(1 - savings.stored_cache / savings.base_cache)


def cached_elements(model: LlamaForCausalLM) -> int:
    """Of two rows of nine tokens."""
    cache = model(tokens(), past_key_values=DynamicCache()).past_key_values
    return sum(
        t.numel() for layer in cache.layers for t in (layer.keys, layer.values) if t is not None
    )


@pytest.mark.parametrize("kind", PLANS)
def test_savings_of_a_converted_config(kind: str) -> None:
    """What is stored does not depend on which of the two configs is asked."""
    base, sharing = dense("gqa"), some_plan(kind, "gqa")
    sharing.validate(base.config)
    converted = shared(base, sharing).config
    sharing.validate(converted)
    asked, again = sharing.savings(base.config), sharing.savings(converted)
    assert again.stored_parameters == asked.stored_parameters
    assert again.stored_cache == asked.stored_cache
    assert again.span_parameters == asked.span_parameters
    assert again.pooled_parameters == 0
    assert (asked.pooled_parameters > 0) == (sharing.kv_heads is not None)


def test_savings_by_hand() -> None:
    # 8 heads of 4 in 4 KV groups, hidden 32: q and o have 32 rows, k and v 16.
    sa = plan(AttentionSpan(1, (2, 3))).savings(config())
    assert sa.span_parameters == 2 * (32 + 16) * 32
    assert (sa.base_cache, sa.stored_cache) == (6 * 32, 6 * 32 - 2 * 16)
    cla = plan(AttentionSpan(1, (2, 3), "kv")).savings(config())
    assert cla.span_parameters == 2 * (16 + 16) * 32
    assert cla.stored_cache == 4 * 32
    pooled = plan(AttentionSpan(1, (2,)), kv_heads=1).savings(config())
    assert pooled.pooled_parameters == 6 * 2 * 12 * 32
    assert pooled.span_parameters == (32 + 4) * 32
    assert (pooled.base_cache, pooled.stored_cache) == (6 * 32, 6 * 8 - 4)
    assert sa.tied_units == cla.tied_units == pooled.tied_units == 0
    assert pooled.units == 6


def test_the_paper_by_arithmetic() -> None:
    """Llama-2-7B with four followers saves 6.25 % of the cache and 2 % of the weights."""
    llama = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    savings = plan(AttentionSpan(22, (23, 24, 25, 26))).savings(llama)
    assert savings.cache_ratio == 0.0625
    assert savings.removed_parameters / savings.base_parameters == pytest.approx(0.02, abs=1e-3)


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANS)
def test_json_round_trip(kind: str, tmp_path: Path) -> None:
    sharing = some_plan(kind, "gqa")
    sharing.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == sharing
    assert SharingPlan.load(tmp_path / "plan.json").hash() == sharing.hash()
    compact = compact_config(config(), sharing)
    compact.save_pretrained(tmp_path)
    assert SharedLlamaConfig.from_pretrained(tmp_path).plan == sharing


def test_the_json_is_that_of_the_design() -> None:
    value = plan(AttentionSpan(2, (3, 4)), kv_heads=2).to_dict()
    assert value == {
        "version": 1,
        "kv_heads": 2,
        "ties": [],
        "removed": [],
        "spans": [{"leader": 2, "followers": [3, 4], "share": "attention", "head_map": None}],
    }


def test_the_hash_tells_spans_apart() -> None:
    identity = (tuple(range(8)),)
    plans = [
        plan(),
        plan(kv_heads=2),
        plan(AttentionSpan(1, (2,))),
        plan(AttentionSpan(1, (3,))),
        plan(AttentionSpan(1, (2,), "kv")),
        plan(AttentionSpan(1, (2,), "attention", identity)),
        plan(AttentionSpan(1, (2,), "attention", (identity[0][::-1],))),
        plan(AttentionSpan(1, (2, 3))),
        plan(AttentionSpan(1, (2,)), AttentionSpan(3, (4,))),
    ]
    assert len({p.hash() for p in plans}) == len(plans)


def test_structure_and_effective_parts() -> None:
    sharing = some_plan("both, ties", "gqa")
    assert sharing.structure() == SharingPlan(spans=sharing.spans)
    assert sharing.effective() is sharing
    assert not sharing.has_stock_form
    assert some_plan("pooled", "gqa").has_stock_form
    chain = (HeadTie((1, 0), (0, 0), ("v",)), HeadTie((5, 0), (1, 0), ("v",)))
    released = SharingPlan(chain, spans=(AttentionSpan(2, (3,)),), released=True)
    released.validate(config())
    assert released.effective().spans == released.spans
    assert released.effective().ties == chain[1:]


# --- bad input ------------------------------------------------------------------------------------

PERMUTED = tuple(range(8))[::-1]


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([AttentionSpan(1, (2, 3)), AttentionSpan(3, (4,))], "overlaps 'span 1 -> [2, 3]"),
        ([AttentionSpan(1, (2,)), AttentionSpan(1, (3,))], "in layer 1; a layer belongs to one"),
        ([AttentionSpan(1, (3,)), AttentionSpan(2, (3,))], "in layer 3"),
        ([AttentionSpan(1, (2,)), AttentionSpan(1, (2,))], "overlaps"),
        ([AttentionSpan(2, (1,))], "follower 1 is not above its leader 2"),
        ([AttentionSpan(2, (2,))], "follower 2 is not above its leader 2"),
        ([AttentionSpan(2, (1, 3))], "follower 1 is not above"),
        ([AttentionSpan(1, (3, 2))], "not ascending"),
        ([AttentionSpan(1, (2, 2))], "name each once"),
        ([AttentionSpan(1, ())], "no followers"),
        ([AttentionSpan(5, (6,))], "layer 6 is out of range; the model has layers 0 to 5"),
        ([AttentionSpan(-1, (2,))], "layer -1 is out of range"),
        ([AttentionSpan(1, (2,), "atention")], "did you mean 'attention'?"),
        ([AttentionSpan(1, (2,), "vk")], "unknown share 'vk'"),
        ([AttentionSpan(1, (2,), "weights")], "use 'attention' or 'kv'"),
        ([AttentionSpan(1, (2,), "attention", ())], "0 rows for 1 followers"),
        ([AttentionSpan(1, (2, 3), "attention", (PERMUTED,))], "1 rows for 2 followers"),
        (
            [AttentionSpan(1, (2,), "attention", (PERMUTED[:4],))],
            "has 4 entries; give one for each",
        ),
        ([AttentionSpan(1, (2,), "attention", ((),))], "has 0 entries"),
        ([AttentionSpan(1, (2,), "kv", (PERMUTED,))], "the 4 KV heads"),
        ([AttentionSpan(1, (2,), "attention", ((8, *PERMUTED[1:]),))], "names head 8; the leader"),
        ([AttentionSpan(1, (2,), "attention", ((-1, *PERMUTED[1:]),))], "names head -1"),
        ([AttentionSpan(1, (2,), "kv", ((0, 1, 2, 4),))], "KV heads 0 to 3"),
    ],
)
def test_a_wrong_span_is_named(spans: list[AttentionSpan], says: str) -> None:
    with pytest.raises(PostshareError) as error:
        plan(*spans).validate(config())
    message = str(error.value)
    assert says in message
    assert "span " in message
    assert "\n" not in message


def test_the_head_map_of_pooled_heads_counts_pooled_heads() -> None:
    good, bad = ((0, 0),), ((0, 0, 1, 1),)
    plan(AttentionSpan(1, (2,), "kv", good), kv_heads=2).validate(config())
    with pytest.raises(PostshareError, match="the 2 KV heads"):
        plan(AttentionSpan(1, (2,), "kv", bad), kv_heads=2).validate(config())


@pytest.mark.parametrize(
    ("share", "tie", "says"),
    [
        ("attention", HeadTie((2, 0), (0, 0), ("q",)), "layer 2 has no q"),
        ("attention", HeadTie((2, 0), (0, 0), ("v", "k")), "layer 2 has no k"),
        ("attention", HeadTie((5, 0), (2, 0), ("k",)), "layer 2 has no k"),
        ("kv", HeadTie((2, 0), (0, 0), ("v",)), "layer 2 has no v"),
        ("kv", HeadTie((5, 0), (2, 0), ("q", "k")), "layer 2 has no k"),
    ],
)
def test_a_tie_on_a_projection_that_a_follower_lacks(share: str, tie: HeadTie, says: str) -> None:
    with pytest.raises(PostshareError, match=says) as error:
        SharingPlan((tie,), spans=(AttentionSpan(1, (2,), share),)).validate(config())
    assert str(tie) in str(error.value)
    assert "span 1 -> [2]" in str(error.value)
    SharingPlan((tie,)).validate(config())


def test_ties_count_pooled_units() -> None:
    tie = HeadTie((2, 3), (0, 0), ("q",))
    SharingPlan((tie,)).validate(config())
    with pytest.raises(PostshareError, match="unit 3 is out of range"):
        SharingPlan((tie,), kv_heads=2).validate(config())


@pytest.mark.parametrize(("model", "asked"), [(4, 3), (4, 8), (1, 2), (4, 0), (4, -2)])
def test_kv_heads_that_do_not_divide(model: int, asked: int) -> None:
    with pytest.raises(PostshareError, match=f"kv_heads {asked} does not divide") as error:
        plan(kv_heads=asked).validate(config(num_key_value_heads=model))
    fitting = [n for n in (1, 2, 4) if n <= model]
    assert str(error.value).endswith(f"use one of {fitting}")


def test_attention_dropout_with_spans() -> None:
    sharing = plan(AttentionSpan(1, (2,)))
    with pytest.raises(PostshareError, match=r"attention_dropout 0\.1.*set it to 0"):
        sharing.validate(config(attention_dropout=0.1))
    plan(kv_heads=2).validate(config(attention_dropout=0.1))
    with pytest.raises(PostshareError, match="attention_dropout"):
        shared(dense(attention_dropout=0.1), sharing)


@pytest.mark.parametrize(
    ("span", "says"),
    [
        ([], r"plan\.spans\[0\] is \[\]"),
        ({"leader": 1}, "has no 'followers'"),
        ({"followers": [1]}, "has no 'leader'"),
        ({"leader": 1, "followers": [2], "shares": "kv"}, "unknown key 'shares'"),
        ({"leader": -1, "followers": [2]}, "leader is -1"),
        ({"leader": True, "followers": [2]}, "leader is True"),
        ({"leader": "1", "followers": [2]}, "leader is '1'"),
        ({"leader": 1, "followers": 2}, "followers is 2"),
        ({"leader": 1, "followers": [2.0]}, "followers is"),
        ({"leader": 1, "followers": [2], "head_map": [0, 1]}, "head_map is no list of lists"),
        ({"leader": 1, "followers": [2], "head_map": [[0, -1]]}, "head_map"),
        ({"leader": 1, "followers": [2], "head_map": {}}, "head_map"),
    ],
)
def test_a_malformed_span_is_named(span: Any, says: str) -> None:
    with pytest.raises(PostshareError, match=says) as error:
        SharingPlan.from_dict({"version": 1, "spans": [span]})
    assert "plan.spans[0]" in str(error.value)


@pytest.mark.parametrize("share", [None, 3, ["kv"], "Attention", "KV"])
def test_a_share_of_another_kind(share: Any) -> None:
    """An unhashable or numeric value too gets the error, not a traceback."""
    value = {"version": 1, "spans": [{"leader": 1, "followers": [2], "share": share}]}
    with pytest.raises(PostshareError, match="share"):
        SharingPlan.from_dict(value).validate(config())


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_kv_heads_of_another_kind(value: Any) -> None:
    with pytest.raises(PostshareError, match=r"plan\.kv_heads"):
        SharingPlan.from_dict({"version": 1, "kv_heads": value})


def test_spans_are_no_object() -> None:
    with pytest.raises(PostshareError, match=r"plan\.spans is dict"):
        SharingPlan.from_dict({"version": 1, "spans": {}})
