"""The compact model against the dense one on the same weights: resident bytes, forward, decode.

Packed, as models compute by default in inference, and in parts (`config.packed: false`).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from timing import interleaved
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sa_models.basis import FACTORED, basis_of, parameter_range
from sa_models.heads import HeadLayout
from sa_models.materialize.shared_basis import with_factors
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.packing import Packing, set_packed_
from sa_models.plan import SharingPlan
from sa_models.scores.weight_cosine import random_matches
from sa_models.search.budget import units_of_ratio
from sa_models.search.pairs import make_plan
from sa_models.weights.parameter_shapes import compact_shapes

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
SHARE = 0.3
"""Of the heads, or of the parameters of q, k and v that a basis saves."""
TARGETS = {"qkv": 1.02, "qkvo": 1.02, "basis": 1.02, "removed": 1.0}
"""At most so many times stock's time: with ties of q, k and v, or all; a basis; removals."""


def plan_of(kind: str, layout: HeadLayout) -> SharingPlan:
    if kind == "basis":
        _, whole = parameter_range(layout, 2)
        return SharingPlan(basis=basis_of(layout, 2, int((1 - SHARE) * whole)))
    count = units_of_ratio(SHARE, layout)
    if kind == "removed":
        every = [(at, unit) for unit in range(layout.units) for at in range(layout.layers)]
        return SharingPlan(removed=tuple(sorted(every[:count])))
    return make_plan(random_matches(layout, 0), layout, count, kind)


def compact_model(dense: LlamaForCausalLM, plan: SharingPlan) -> SharedLlamaForCausalLM:
    """The compact model of a plan, which is written into the weights of the dense one as well."""
    layout = HeadLayout.from_config(dense.config)
    if plan.basis is None:
        materialize_(dict(dense.named_parameters()), layout, plan)
        return SharedLlamaForCausalLM.from_materialized(dense, plan).eval()
    draw = torch.Generator().manual_seed(1)
    factors = {
        name: 0.02 * torch.randn(shape, generator=draw)
        for name, shape in compact_shapes(dense.config, plan).items()
        if name.endswith(("basis.weight", "coefficients.weight"))
    }
    compact = with_factors(dense, plan, factors).eval()
    for layer in range(layout.layers):
        for p in FACTORED:
            product = getattr(compact.model.layers[layer].self_attn, f"{p}_proj")
            weight = product.coefficients.weight @ product.owner.basis.weight
            dense.get_parameter(layout.parameter_name(layer, p)).data.copy_(weight)
    return compact


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
def measure_shape(shape: dict[str, int], kind: str, rounds: tuple[int, int]) -> dict[str, float]:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape)).eval()
    plan = plan_of(kind, HeadLayout.from_config(dense.config))
    compact, parts = (compact_model(dense, plan) for _ in range(2))
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
        "target_over_dense": TARGETS[kind],
        "forward_in_parts_over_dense": forward["parts"] / forward["dense"],
        "decode_in_parts_over_dense": decoding["parts"] / decoding["dense"],
    }


def measure() -> dict[str, dict[str, float]]:
    """Of every shape and every kind of :data:`TARGETS`."""
    return {
        f"{name}_{kind}": measure_shape(shape, kind, (7, 101))
        for name, shape in SHAPES.items()
        for kind in TARGETS
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
