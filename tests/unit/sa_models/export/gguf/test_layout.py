"""What a GGUF file says and stores, without the package gguf: by a plan's own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from sa_models.errors import PostshareError
from sa_models.export.gguf.layout import GgufLayout, Kind
from sa_models.plan import HeadTie, SharingPlan
from sa_models.spans import AttentionSpan
from tests.support.gguf_llama import gguf_name, interleaved


def config(**options: Any) -> LlamaConfig:
    """GQA: eight query heads of 16 on four KV heads, hidden size 96, untied."""
    fields = {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
    }
    return LlamaConfig(**(fields | options))


def layout(plan: SharingPlan, to: Kind = "f16", **options: Any) -> GgufLayout:
    return GgufLayout(config(**options), plan, to)


TIES = SharingPlan(ties=(HeadTie((1, 1), (0, 0), ("q", "k", "v", "o")),))
UNIFORM = SharingPlan(removed=((0, 3), (1, 0), (2, 2)))
FREE = SharingPlan(removed=((0, 3), (1, 0), (1, 1), *((2, unit) for unit in range(4))))
FIRST = SharingPlan(removed=(*((0, unit) for unit in range(4)), (1, 2)))


@pytest.mark.parametrize(
    ("plan", "heads", "kv_heads"),
    [
        (SharingPlan(), 8, 4),
        (TIES, 8, 4),
        (SharingPlan(kv_heads=2), 8, 2),
        (UNIFORM, 6, 3),
        (SharingPlan(kv_heads=2, removed=((0, 1), (1, 0), (2, 0))), 4, 1),
    ],
)
def test_one_shape_in_every_layer_is_llama(plan: SharingPlan, heads: int, kv_heads: int) -> None:
    keys = layout(plan).keys()
    assert keys["llama.attention.head_count"] == heads
    assert keys["llama.attention.head_count_kv"] == kv_heads
    assert keys["llama.feed_forward_length"] == 64
    assert keys["llama.attention.key_length"] == keys["llama.attention.value_length"] == 16
    assert keys["llama.rope.dimension_count"] == 16


@pytest.mark.parametrize(
    ("plan", "heads", "kv_heads"),
    [(FREE, [6, 4, 0], [3, 2, 0]), (FIRST, [2, 6, 8], [1, 3, 4])],
)
def test_layers_that_differ_are_deci(plan: SharingPlan, heads: list, kv_heads: list) -> None:
    """The first layer keeps a unit: llama.cpp takes the width of all heads from it."""
    keys = layout(plan).keys()
    assert keys["deci.attention.head_count"] == heads
    assert keys["deci.attention.head_count_kv"] == kv_heads
    assert keys["deci.feed_forward_length"] == [64, 64, 64]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plan", [SharingPlan(), TIES, UNIFORM, FREE, SharingPlan(kv_heads=1)])
@pytest.mark.parametrize(("to", "size"), [("f32", 4), ("f16", 2), ("bf16", 2)])
def test_bytes_are_the_plans_arithmetic(plan: SharingPlan, to: Kind, size: int, tied: bool) -> None:
    made = layout(plan, to, tie_word_embeddings=tied)
    savings = plan.savings(made.config)
    removed = savings.removed_unit_parameters + savings.dropped_norm_parameters
    norms = (2 * 3 + 1 - savings.dropped_layers) * 96
    matrices = savings.expanded_parameters - removed - norms
    assert sum(tensor.nbytes for tensor in made.tensors) == matrices * size + norms * 4
    assert ("output.weight" in {tensor.name for tensor in made.tensors}) != tied


def test_a_first_layer_that_is_dropped_costs_one_unit_of_zeros_and_its_norm() -> None:
    made = layout(FIRST, "f32")
    savings = FIRST.savings(made.config)
    unit = 96 * 16 * (2 + 2 + 1 + 1)  # two query heads: q and o; k, v
    stored = savings.expanded_parameters - savings.removed_unit_parameters + unit
    assert sum(tensor.nbytes for tensor in made.tensors) == 4 * stored


def test_blocks_and_what_they_do_not_divide() -> None:
    """Rows of 96 are three blocks, of 64 two; o with three heads has 48 columns, and is f16."""
    plan = SharingPlan(kv_heads=4, removed=((0, 3), (1, 0)))
    made = GgufLayout(config(num_attention_heads=4), plan, "q4_0")
    kinds = {tensor.name: (tensor.kind, tensor.nbytes) for tensor in made.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == ("q8_0", 128 * 3 * 34)
    assert kinds["blk.0.attn_q.weight"] == ("q4_0", 48 * 3 * 18)
    assert kinds["blk.2.attn_output.weight"] == ("q4_0", 96 * 2 * 18)
    assert kinds["blk.0.attn_output.weight"] == ("f16", 96 * 48 * 2)
    assert kinds["blk.0.attn_norm.weight"] == ("f32", 96 * 4)
    assert made.unblocked() == ["blk.0.attn_output.weight", "blk.1.attn_output.weight"]
    assert layout(plan, "f16").unblocked() == []
    q4_1 = GgufLayout(config(num_attention_heads=4), plan, "q4_1").tensors
    assert {t.name: t.nbytes for t in q4_1}["blk.0.attn_q.weight"] == 48 * 3 * 20


@pytest.mark.parametrize("plan", [SharingPlan(), FREE])
def test_rows_are_kept_and_ordered_as_llama_cpp_rotates_them(plan: SharingPlan) -> None:
    made = layout(plan)
    for layer, kept in ((0, [0, 1, 2]), (1, [2, 3])) if plan is FREE else ((0, range(4)),):
        for projection, width in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            name = f"model.layers.{layer}.self_attn.{projection}_proj.weight"
            dense = torch.randn(made.heads.shape(projection))
            selected = made.rows(name)
            stored = dense if selected is None else dense.index_select(*selected)
            by_unit = dense.t() if projection == "o" else dense
            parts = torch.cat([by_unit[u * width : (u + 1) * width] for u in kept])
            if projection in "qk":
                parts = torch.from_numpy(interleaved(parts.numpy()))
            assert torch.equal(stored, parts.t() if projection == "o" else parts)


def test_names_are_llama_cpps() -> None:
    for tensor in layout(FREE).tensors:
        assert tensor.source is not None
        assert tensor.name == gguf_name(tensor.source)


def test_a_mlps_biases_are_stored() -> None:
    stored = {t.name: t for t in layout(SharingPlan(), "q8_0", mlp_bias=True).tensors}
    assert (stored["blk.2.ffn_down.bias"].kind, stored["blk.2.ffn_down.bias"].shape) == (
        "f32",
        (96,),
    )


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (
            SharingPlan(spans=(AttentionSpan(1, (2,), "kv"),)),
            {},
            "a plan with spans has no GGUF form",
        ),
        (SharingPlan(), {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            SharingPlan(),
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type is 'dynamic', which is not written as GGUF",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    plan: SharingPlan, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PostshareError, match=message) as caught:
        layout(plan, **options)
    assert "\n" not in str(caught.value)
