"""What vLLM does with a compact model, without vLLM: an attention that owns the caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sa_models import SharingPlan
from sa_models.attention import SharedAttention
from sa_models.errors import PostshareError
from sa_models.modeling import SharedLlamaForCausalLM, compact_config
from sa_models.serving.packed_llama import packed_config
from sa_models.serving.vllm_plugin import check_packed, check_supported
from tests.support.reference import dense, shared, some_plan, tokens


def paged(
    module: SharedAttention, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What vLLM's Transformers backend puts behind the interface, written out for one sequence.

    No mask, no batch in the result, a cache for each layer but for those that read their leader's.
    """
    assert mask is None
    if module.reads is module:
        new = (key[0], value[0])
        old = getattr(module, "held", None)
        module.held = (
            new if old is None else tuple(map(torch.cat, zip(old, new, strict=True), (1, 1)))
        )
    keys, values = module.reads.held
    rows, seen = query.shape[2], keys.shape[1] - query.shape[2]
    output = torch.zeros(rows, query.shape[1], query.shape[3])
    for head in range(query.shape[1]):
        kv = head // module.num_key_value_groups
        for row in range(rows):
            scores = keys[kv, : seen + row + 1] @ query[0, head, row] * module.scaling
            output[row, head] = scores.softmax(0) @ values[kv, : seen + row + 1]
    return output.flatten(1), None


DROPPED = SharingPlan(removed=tuple((layer, unit) for layer in (0, 3) for unit in range(4)))


@pytest.mark.parametrize("kind", ["both", "both, ties", "pooled, both", "dropped"])
def test_an_attention_that_owns_the_caches_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Prompt and decoded tokens; SA followers cache the leader's keys, CLA followers and dropped
    layers nothing."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "paged", paged)
    plan = DROPPED if kind == "dropped" else some_plan(kind, "gqa")
    model = shared(dense("gqa"), plan).eval()
    ids = tokens(rows=1)
    with torch.no_grad():
        expected = model(ids).logits[0]
        serve(model)
        found = [model(ids[:, :6], use_cache=False).logits[0]]
        for at in range(6, ids.shape[1]):
            position = torch.tensor([[at]])
            one = model(ids[:, at : at + 1], position_ids=position, use_cache=False).logits[0]
            found.append(one)
    assert float((torch.cat(found) - expected).abs().max()) <= 1e-5
    held = [hasattr(layer.self_attn, "held") for layer in model.model.layers]
    spans = plan.leader_of()
    reading = [i for i, s in spans.items() if s.share == "kv" and s.map_of(i) is None]
    reading += plan.dropped(plan.layout(model.config))
    assert [i for i, has in enumerate(held) if not has] == sorted(reading)


def serve(model: SharedLlamaForCausalLM) -> None:
    """As `sa_models.serving.vllm_model` sets the model up."""
    model.config._attn_implementation = "paged"
    model.config.reuse_rows = 0
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention, span in zip(attentions, model.model.spans, strict=True):
        follows = attention.follows == "kv" and attention.head_map is None
        # Not registered as a submodule: a leader is one already.
        attention.__dict__["reads"] = attentions[span.leader] if follows else attention


def test_what_vllm_cannot_serve_is_refused() -> None:
    one = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
    two = SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1)
    check_supported(SimpleNamespace(parallel_config=one, quant_config=None))
    with pytest.raises(PostshareError, match="one device"):
        check_supported(SimpleNamespace(parallel_config=two, quant_config=None))
    with pytest.raises(PostshareError, match="quantized"):
        check_supported(SimpleNamespace(parallel_config=one, quant_config=object()))


def served_on(devices: int, stages: int = 1, quantized: bool = False) -> SimpleNamespace:
    """What vLLM tells of a plan that leaves 4, 3 and 2 of 4 units."""
    plan = SharingPlan(removed=((1, 0), (2, 0), (2, 3)))
    config = packed_config(compact_config(dense("gqa").config, plan))
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=devices, pipeline_parallel_size=stages
        ),
        model_config=SimpleNamespace(hf_config=config),
        quant_config=object() if quantized else None,
    )


def test_stock_layers_are_split_where_all_their_heads_divide() -> None:
    check_packed(served_on(1))
    with pytest.raises(PostshareError, match=r"6 heads in 3 KV groups left, .* among 2 devices"):
        check_packed(served_on(2))
    with pytest.raises(PostshareError, match="pipeline stages"):
        check_packed(served_on(1, stages=2))
    with pytest.raises(PostshareError, match="quantized"):
        check_packed(served_on(1, quantized=True))
