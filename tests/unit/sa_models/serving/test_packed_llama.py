"""Plans without spans as Llamas of stock layers, as vLLM gets them, against the reference."""

from __future__ import annotations

import random

import pytest
import torch

from sa_models import HeadTie, SharedLlamaForCausalLM, SharingPlan
from sa_models.basis import SharedBasis
from sa_models.materialize.shared_basis import factorized
from sa_models.modeling import compact_config
from sa_models.serving.packed_llama import (
    PackedLlamaModel,
    is_packable,
    layer_configs,
    packed_config,
    packed_weights,
    unsplittable,
)
from tests.support.reference import SHAPES, Reference, dense, shared, some_plan, tokens

ALL = ("q", "k", "v", "o")


def packed(model: SharedLlamaForCausalLM, dtype: torch.dtype = torch.float32) -> PackedLlamaModel:
    """In fp32, of weights stored in a dtype, which arrive in no order."""
    made = PackedLlamaModel(packed_config(model.config)).eval()
    stored = [(name, p.detach().to(dtype)) for name, p in model.named_parameters()]
    random.Random(0).shuffle(stored)
    weights = {
        name.removeprefix("model."): weight
        for name, weight in packed_weights(stored, model.config)
        if name.startswith("model.")
    }
    made.load_state_dict(weights)
    return made


def removals(shape: str) -> SharingPlan:
    """Layers that lose 0, 1 and 2 units; ties of some within, across and onto layers that lose."""
    if shape == "mqa":  # the only unit of a layer cannot be removed
        return SharingPlan((HeadTie((4, 0), (1, 0), ALL), HeadTie((2, 0), (0, 0), ("k", "o"))))
    ties = (
        HeadTie((0, 1), (0, 0), ALL),
        HeadTie((3, 2), (1, 2), ("q", "k", "v")),
        HeadTie((2, 2), (3, 1), ("o",)),
    )
    return SharingPlan(ties, removed=((1, 0), (1, 1), (3, 0), (5, 2)))


POOLED = SharingPlan((HeadTie((2, 0), (0, 1), ALL),), kv_heads=2, removed=((1, 0), (4, 1)))
CASES = [(shape, removals(shape)) for shape in SHAPES]
CASES += [(shape, POOLED) for shape in ("mha", "gqa")]


@pytest.mark.parametrize(("shape", "plan"), CASES)
def test_stock_layers_compute_what_the_plan_says(shape: str, plan: SharingPlan) -> None:
    base, ids = dense(shape), tokens()
    expected = Reference.of(base, plan)(ids).hidden[-1]
    with torch.no_grad():
        found = packed(shared(base, plan))(ids).last_hidden_state
    assert float((found - expected).abs().max()) <= 1e-5


def test_factors_are_multiplied() -> None:
    base, ids = dense("gqa"), tokens()
    plan = SharingPlan(basis=SharedBasis(4, (19, 17), (7, 11), (13, 7)))
    model = factorized(base, plan, [{"input_ids": ids}]).eval()
    factors = {n: p.detach().double() for n, p in model.named_parameters()}
    for layer in range(6):
        for p in "qkv":
            name = f"model.layers.{layer}.self_attn.{p}_proj"
            first = f"model.layers.{layer // 4 * 4}.self_attn.{p}_proj"
            product = factors[f"{name}.coefficients.weight"] @ factors[f"{first}.basis.weight"]
            base.get_parameter(f"{name}.weight").data = product.float()
    expected = Reference.of(base, SharingPlan())(ids).hidden[-1]
    with torch.no_grad():
        found = packed(model)(ids).last_hidden_state
    assert float((found - expected).abs().max()) <= 1e-5


def test_factors_in_16_bits_can_be_served_in_fp32() -> None:
    """As they were exported, and read into fp32: their products are not rounded to 16 bits."""
    base, ids = dense("gqa"), tokens()
    plan = SharingPlan(basis=SharedBasis(4, (19, 17), (7, 11), (13, 7)))
    model = factorized(base, plan, [{"input_ids": ids}]).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        found = packed(model, torch.bfloat16)(ids).last_hidden_state
    assert float((found - expected).abs().max()) <= 1e-5


def test_what_a_layer_has_and_how_it_splits() -> None:
    """Eight heads in four groups: layer 1 keeps two groups, layers 3 and 5 three."""
    config = shared(dense("gqa"), removals("gqa")).config
    heads = [(c.num_attention_heads, c.num_key_value_heads) for c in layer_configs(config)]
    assert heads == [(8, 4), (4, 2), (8, 4), (6, 3), (8, 4), (6, 3)]
    assert config.num_attention_heads == 8
    assert unsplittable(config, 1) is None
    uneven = unsplittable(config, 2)
    assert uneven is not None
    assert uneven.num_key_value_heads == 3
    even = shared(dense("gqa"), SharingPlan(removed=((1, 0), (1, 1)))).config
    assert unsplittable(even, 2) is None
    # Two groups of four heads: each is held by two of four devices.
    assert unsplittable(even, 4) is None
    assert unsplittable(even, 3) is not None


@pytest.mark.parametrize("kind", ["sa", "cla mapped"])
def test_spans_and_layers_without_attention_need_our_modules(kind: str) -> None:
    config = dense("gqa").config
    plans = {
        False: [some_plan(kind, "gqa"), SharingPlan(removed=tuple((2, unit) for unit in range(4)))],
        True: [SharingPlan(), removals("gqa")],
    }
    for packable, some in plans.items():
        for plan in some:
            given = packed_config(compact_config(config, plan))
            assert is_packable(given) is packable
