"""The compact model against the dense one on the same weights: resident bytes, forward, decode.

Packed, as models compute by default in inference, and in parts (`config.packed: false`).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from timing import interleaved
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sa_models.heads import HeadLayout
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.packing import Packing, set_packed_
from sa_models.scores.weight_cosine import random_matches
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan

SHAPES = {
    "compact_hidden1024_16x16": {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
    },
    "compact_demo_shape": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
}
CONTEXT = 256


def decode(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[], object]:
    """One token after a cached prompt; the cache is cut back each time."""
    cache = DynamicCache(config=LlamaConfig(**model.config.to_dict()))
    model(prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, :1]

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


@torch.no_grad()  # what inference mode makes is not packed
def measure_shape(shape: dict[str, int], share: str, rounds: tuple[int, int]) -> dict[str, float]:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape)).eval()
    layout = HeadLayout.from_config(dense.config)
    plan = make_plan(random_matches(layout, 0), layout, units_of_ratio(0.3, layout), share)
    materialize_(dict(dense.named_parameters()), layout, plan)
    compact, parts = (
        SharedLlamaForCausalLM.from_materialized(dense, plan).eval() for _ in range(2)
    )
    set_packed_(parts, False)
    # Weights made at first use lie in other memory than copies, which took 4 to 6 % longer to read:
    # both models hold copies of their attention weights, and share all others.
    for name, parameter in dense.named_parameters():
        if HeadLayout.parse_name(name) is not None:
            parameter.data = parameter.data.clone()
    ids = torch.randint(0, shape["vocab_size"], (4, CONTEXT))
    difference = float((dense(ids).logits - compact(ids).logits).abs().max())
    assert difference < 1e-4, difference
    forward = interleaved(
        rounds[0],
        dense=lambda: dense(ids, use_cache=False),
        compact=lambda: compact(ids, use_cache=False),
        parts=lambda: parts(ids, use_cache=False),
    )
    models = {"dense": dense, "compact": compact, "parts": parts}
    decoding = interleaved(
        rounds[1], **{name: decode(model, ids[:1]) for name, model in models.items()}
    )
    packed = sum(m.packed_bytes for m in compact.modules() if isinstance(m, Packing))
    held = sum(p.untyped_storage().nbytes() for p in compact.parameters())
    return {
        "resident_parameter_bytes": held,
        "predicted_parameter_bytes": plan.savings(dense.config).bytes(4)[1],
        "dense_parameter_bytes": plan.savings(dense.config).bytes(4)[0],
        "packed_bytes": packed,
        "seconds_forward_dense": forward["dense"],
        "forward_over_dense": forward["compact"] / forward["dense"],
        "seconds_decode_dense": decoding["dense"],
        "decode_over_dense": decoding["compact"] / decoding["dense"],
        "target_over_dense": 1.02,
        "forward_in_parts_over_dense": forward["parts"] / forward["dense"],
        "decode_in_parts_over_dense": decoding["parts"] / decoding["dense"],
    }


def measure() -> dict[str, dict[str, float]]:
    """Sharing q, k and v, which is the recipes' default, and all four projections."""
    return {
        f"{name}_{share}": measure_shape(shape, share, (7, 101))
        for name, shape in SHAPES.items()
        for share in ("qkv", "qkvo")
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
