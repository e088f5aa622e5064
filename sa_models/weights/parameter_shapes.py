"""Names and shapes of a model's parameters, from its config and plan alone. Imports no torch."""

from __future__ import annotations

from typing import Any

from sa_models.basis import FACTORED, basis_name, coefficients_name
from sa_models.heads import PROJECTIONS, HeadLayout
from sa_models.plan import SharingPlan


def llama_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """{parameter name: shape} of a stock ``LlamaForCausalLM``, in the order of its layers.

    With tied embeddings ``lm_head.weight`` is not listed: it is the embedding.
    """
    layout = HeadLayout.from_config(config)
    hidden, middle, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layout.layers):
        prefix = f"model.layers.{layer}."
        for p in PROJECTIONS:
            shapes[layout.parameter_name(layer, p)] = layout.shape(p)
        for name, shape in (
            ("gate_proj", (middle, hidden)),
            ("up_proj", (middle, hidden)),
            ("down_proj", (hidden, middle)),
        ):
            shapes[f"{prefix}mlp.{name}.weight"] = shape
            if getattr(config, "mlp_bias", False):
                shapes[f"{prefix}mlp.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def compact_shapes(config: Any, plan: SharingPlan) -> dict[str, tuple[int, ...]]:
    """{parameter name: shape} of a compact model; a layer may own nothing: (0, hidden), and a
    dropped one has no attention at all."""
    layout, own = plan.layout(config), plan.own_units(plan.layout(config))
    lost = plan.dropped_names(layout)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expanded_shapes(config, plan).items():
        where = HeadLayout.parse_name(name)
        if name in lost:
            continue
        if where is None:
            shapes[name] = shape
        elif plan.basis is not None and where[1] in FACTORED:
            first, rank = plan.basis.place(*where)
            rows, hidden = shape
            if first == where[0]:
                shapes[basis_name(*where)] = (rank, hidden)
            shapes[coefficients_name(*where)] = (rows, rank)
        else:
            layer, p = where
            features, hidden = len(own[layer][p]) * layout.width(p), layout.hidden_size
            shapes[name] = (hidden, features) if p == "o" else (features, hidden)
    return shapes


def expanded_shapes(config: Any, plan: SharingPlan) -> dict[str, tuple[int, ...]]:
    """{parameter name: shape} of the dense form, without what followers do not have."""
    absent = plan.absent()
    shapes = llama_shapes(config)
    return {n: shape for n, shape in shapes.items() if HeadLayout.parse_name(n) not in absent}
