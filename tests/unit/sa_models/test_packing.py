"""Packed weights: the dense model's own numbers in inference, and never those of older weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.heads import HeadLayout
from sa_models.materialize.shared_basis import factorized
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.packing import set_packed_
from sa_models.plan import HeadTie, SharingPlan
from sa_models.projections import SharedBasisLinear, SharedLinear
from tests.unit.sa_models.test_basis import some, text

HIDDEN, LAYERS, HEADS = 48, 4, 4


def dense(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=12,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def pair(kv_heads: int, projections: str) -> tuple[LlamaForCausalLM, SharedLlamaForCausalLM]:
    """The materialized model and the compact one: the last units of two layers are tied."""
    model = dense(kv_heads)
    targets = [(layer, kv_heads - 1) for layer in (1, 3)]
    plan = SharingPlan(tuple(HeadTie(unit, (0, 0), tuple(projections)) for unit in targets))
    layout = HeadLayout.from_config(model.config)
    materialize_(dict(model.named_parameters()), layout, plan)
    return model, SharedLlamaForCausalLM.from_materialized(model, plan).eval()


def factors() -> SharedLlamaForCausalLM:
    model = dense(2)
    layout = HeadLayout.from_config(model.config)
    return factorized(model, some(layout), text()).eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def inferred(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(tokens() if ids is None else ids).logits


def stored_in_parts(model: nn.Module) -> list[SharedLinear | SharedBasisLinear]:
    return [
        m
        for m in model.modules()
        if isinstance(m, SharedBasisLinear) or (isinstance(m, SharedLinear) and not m.owns_all)
    ]


def unpacked(model: nn.Module) -> torch.Tensor:
    """What the weights as they are give, part by part."""
    set_packed_(model, False)
    logits = inferred(model)
    set_packed_(model, True)
    return logits


@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 1)])
@pytest.mark.parametrize("projections", ["qkvo", "qkv", "o", "k"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_computes_what_the_dense_model_does(
    kv_heads: int, projections: str, shape: tuple[int, int]
) -> None:
    model, compact = pair(kv_heads, projections)
    ids = tokens(*shape)
    if shape[1] > 1:
        assert torch.equal(inferred(compact, ids), inferred(model, ids))
    # Of one row, o that owns all columns is summed in another order: it is stored transposed.
    torch.testing.assert_close(inferred(compact, ids), inferred(model, ids), rtol=0, atol=1e-5)
    for module in stored_in_parts(compact):
        name = next(n for n, m in compact.named_modules() if m is module)
        assert torch.equal(module._packed.weight, model.get_submodule(name).weight)
    difference = (compact(ids).logits - model(ids).logits).abs().max()  # with gradients: in parts
    assert float(difference.detach()) <= 1e-5


def test_it_generates_what_the_dense_model_does() -> None:
    model, compact = pair(2, "qkvo")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(compact.generate(tokens(), **options), model.generate(tokens(), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_multiplied_once(dtype: torch.dtype) -> None:
    model = factors().to(dtype)
    exact_logits = unpacked(factors().to(dtype).double())  # of the rounded factors
    packed, parts = (
        float((logits.double() - exact_logits).square().mean().sqrt())
        for logits in (inferred(model), unpacked(model))
    )
    assert packed <= 1.2 * parts <= (1e-4 if dtype == torch.float32 else 0.1)
    inferred(model)
    assert len(stored_in_parts(model)) == 3 * LAYERS
    for module in stored_in_parts(model):
        weight = module._packed.weight
        assert weight is not None
        exact = module.coefficients.weight.double() @ module.owner.basis.weight.double()
        error = (weight.double() - exact).abs().max() / exact.abs().max()
        assert float(error) <= 2 * torch.finfo(dtype).eps


def test_nothing_of_it_is_stored_or_counted(tmp_path: Path) -> None:
    _, compact = pair(2, "qkvo")
    before = {name: value.clone() for name, value in compact.state_dict().items()}
    parameters = sum(p.numel() for p in compact.parameters())
    inferred(compact)
    held = [m._packed.weight for m in stored_in_parts(compact)]
    # Two layers read another's unit in all four projections; the owner reads its own.
    assert [None if w is None else w.numel() for w in held] == 2 * [48 * 48, 24 * 48, 24 * 48, 2304]
    assert sum(p.numel() for p in compact.parameters()) == parameters
    after = compact.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    compact.save_pretrained(tmp_path)
    again = SharedLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(inferred(again), inferred(compact))


def test_training_drops_it_and_gradients_do_not_use_it() -> None:
    _, compact = pair(2, "qkvo")
    inferred(compact)
    compact.train()
    assert all(m._packed.weight is None for m in stored_in_parts(compact))
    with torch.no_grad():
        compact(tokens())
    assert all(m._packed.weight is None for m in stored_in_parts(compact))
    compact.eval()
    compact(tokens()).logits.sum().backward()
    assert all(m._packed.weight is None for m in stored_in_parts(compact))


def test_a_config_can_do_without(tmp_path: Path) -> None:
    _, compact = pair(2, "qkvo")
    compact.config.packed = False
    compact.save_pretrained(tmp_path)
    spare = SharedLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    logits = inferred(spare)
    assert all(m._packed.weight is None for m in stored_in_parts(spare))
    assert float((logits - inferred(compact)).abs().max()) <= 1e-5


# --- a stale weight is a wrong answer -------------------------------------------------------------


def owner(model: nn.Module) -> nn.Linear:
    """A weight of layer 0 that layers 1 and 3 read."""
    projection = model.model.layers[0].self_attn.q_proj
    return projection.basis if isinstance(projection, SharedBasisLinear) else projection


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        owner(model).weight.mul_(1.5)


def through_data(model: nn.Module) -> None:
    owner(model).weight.data += 0.25


def data_replaced(model: nn.Module) -> None:
    parameter = owner(model)._parameters["weight"]
    parameter.data = parameter.data * 1.5


def parameter_replaced(model: nn.Module) -> None:
    owner(model).weight = nn.Parameter(owner(model).weight.detach() * 1.5)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    state = {name: 1.1 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def stepped(model: nn.Module) -> None:
    """As a Trainer that never leaves evaluation mode would."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(tokens()).logits.sum().backward()
    optimizer.step()


def held_since_before(model: nn.Module) -> None:
    """As an average of weights is put in place: eval() is called after it."""
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.eval()


CHANGES = [
    in_place,
    through_data,
    data_replaced,
    parameter_replaced,
    loaded,
    assigned,
    stepped,
    held_since_before,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["ties", "factors"])
def test_a_change_of_what_it_was_made_of_is_seen(
    kind: str, change: Callable[[nn.Module], None]
) -> None:
    model = pair(2, "qkvo")[1] if kind == "ties" else factors()
    before = inferred(model)
    assert any(m._packed.weight is not None for m in stored_in_parts(model))
    change(model)
    after = inferred(model)
    assert float((after - before).abs().max()) > 0.01
    torch.testing.assert_close(after, unpacked(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(dtype: torch.dtype) -> None:
    """Where o is not tied it is stored transposed, and a CPU's fp16 product may add up in another
    order there: the dense model is laid out alike."""
    model, compact = pair(2, "qkvo")
    inferred(compact)
    for layer in (0, 2):
        o_proj = model.model.layers[layer].self_attn.o_proj
        o_proj.weight.data = o_proj.weight.data.t().contiguous().t()
        assert (
            o_proj.weight.stride() == compact.model.layers[layer].self_attn.o_proj.weight.stride()
        )
    assert torch.equal(inferred(compact.to(dtype)), inferred(model.to(dtype)))


def test_a_copy_is_of_its_own() -> None:
    _, compact = pair(2, "qkvo")
    before = inferred(compact)
    for made in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
        assert torch.equal(inferred(made), before)
        in_place(made)
        assert not torch.equal(inferred(made), before)
        assert torch.equal(inferred(compact), before)


def test_a_merged_adapter_is_seen() -> None:
    _, compact = pair(2, "qkvo")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(compact, LoraConfig(r=2, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    before = inferred(compact)
    attention = compact.model.layers[1].self_attn
    # Only of projections that own all their rows: PEFT adds to whole weights.
    names = [n for n in targets if getattr(attention, n).base_layer.owns_all]
    assert names == []
    kept = compact.model.layers[0].self_attn.q_proj
    kept.merge()
    torch.testing.assert_close(inferred(compact), unpacked(compact), rtol=1e-4, atol=1e-4)
    assert float((inferred(compact) - before).abs().max()) > 0.01  # readers see the merged weight
    kept.unmerge()
    torch.testing.assert_close(inferred(compact), before, rtol=1e-3, atol=1e-3)


def test_a_compiled_model_sees_changes() -> None:
    _, compact = pair(2, "qkvo")
    inferred(compact)
    compiled = torch.compile(compact, backend="eager", fullgraph=True)
    torch.testing.assert_close(inferred(compiled), unpacked(compact), rtol=1e-4, atol=1e-4)
    in_place(compact)
    torch.testing.assert_close(inferred(compiled), unpacked(compact), rtol=1e-4, atol=1e-4)


def test_factors_keep_their_order() -> None:
    """Moments of an optimizer and shards of a file follow the parameters."""
    names = [name for name, _ in factors().model.layers[0].self_attn.q_proj.named_parameters()]
    assert names == ["basis.weight", "coefficients.weight"]
