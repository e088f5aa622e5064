"""The compact model against the materialized dense one, in every shape."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sa_models.heads import HeadLayout, unit_view
from sa_models.materialize.ties import materialize_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.packing import set_packed_
from sa_models.plan import HeadTie, SharingPlan, resolve_roots
from tests.support.transformers_versions import checkpoint_layers

SUBSETS = ["q", "v", "o", "qk", "qkv", "vo", "qkvo"]


def dense(kv_heads: int, tied: bool = False, seed: int = 0, **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 36, "head_dim": 10, "num_attention_heads": 6, "num_hidden_layers": 4}
    config = LlamaConfig(
        vocab_size=50,
        intermediate_size=44,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **(shape | fields),
    )
    return LlamaForCausalLM(config).eval()


def some_plan(config: LlamaConfig, projections: str, whole_layer: int | None = 2) -> SharingPlan:
    """Most units tied, and all units of one layer, so that it owns nothing there."""
    generator = random.Random(str((config.num_key_value_heads, projections)))
    units = HeadLayout.from_config(config).units
    ties = [
        HeadTie((layer, u), (generator.randrange(layer), generator.randrange(units)), (p,))
        for p in projections
        for layer in range(1, config.num_hidden_layers)
        for u in range(units)
        if layer == whole_layer or generator.random() < 0.6
    ]
    plan = SharingPlan(resolve_roots(ties))
    plan.validate(config)
    return plan


def shared_pair(kv_heads: int, projections: str, merge="copy", tied=False):
    model = dense(kv_heads, tied)
    plan = some_plan(model.config, projections)
    layout = HeadLayout.from_config(model.config)
    materialize_(dict(model.named_parameters()), layout, plan, merge)
    return model, SharedLlamaForCausalLM.from_materialized(model, plan), plan


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("projections", SUBSETS)
def test_compact_equals_materialized(kv_heads: int, projections: str) -> None:
    model, compact, plan = shared_pair(kv_heads, projections, tied=kv_heads == 3)
    difference = (model(tokens()).logits - compact(tokens()).logits).abs().max()
    assert float(difference) <= 1e-5
    stored = sum(p.numel() for p in compact.parameters())
    assert stored == plan.savings(model.config).stored_parameters
    assert stored < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_mean_merge_by_hand(kv_heads: int) -> None:
    model = dense(kv_heads)
    before = copy.deepcopy(model)
    layout = HeadLayout.from_config(model.config)
    plan = SharingPlan((HeadTie((1, 1), (0, 0), tuple("qo")), HeadTie((3, 0), (0, 0), tuple("qo"))))
    materialize_(dict(model.named_parameters()), layout, plan, "mean")
    for p in "qo":

        def slices(m, p=p):
            return [
                unit_view(m.get_parameter(layout.parameter_name(layer, p)), layout, p)[unit]
                for layer, unit in ((0, 0), (1, 1), (3, 0))
            ]

        mean = sum(s.double() for s in slices(before)) / 3
        for got in slices(model):
            torch.testing.assert_close(got.double(), mean, rtol=0, atol=1e-7)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(model.get_parameter(untouched), before.get_parameter(untouched))


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_a_shared_slice_is_the_sum_over_its_readers(
    kv_heads: int, checkpointing: bool
) -> None:
    model, compact, plan = shared_pair(kv_heads, "qkvo")
    layout = HeadLayout.from_config(model.config)
    if checkpointing:
        checkpoint_layers(compact)
    for m in (model, compact):
        m.train()
        m(tokens(), labels=tokens()).loss.backward()
    source_of = plan.sources()
    for name, parameter in compact.named_parameters():
        if "self_attn" not in name:
            expected = model.get_parameter(name).grad
        else:
            layer, p = int(name.split(".")[2]), name.split(".")[4][0]
            expected = torch.cat(
                [
                    sum(
                        unit_view(
                            model.get_parameter(layout.parameter_name(at, p)).grad, layout, p
                        )[u]
                        for at in range(layout.layers)
                        for u in range(layout.units)
                        if source_of.get((at, u, p), (at, u)) == (layer, own)
                    )
                    for own in range(layout.units)
                    if (layer, own, p) not in source_of
                ]
                or [torch.zeros(0, layout.hidden_size)]
            )
            expected = expected.T if p == "o" else expected
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_generation_with_and_without_cache(kv_heads: int) -> None:
    model, compact, _ = shared_pair(kv_heads, "qkvo")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(1), **options)
    assert torch.equal(compact.generate(tokens(1), **options), expected)
    assert torch.equal(compact.generate(tokens(1), use_cache=False, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_through_the_auto_class(tmp_path: Path, dtype: torch.dtype) -> None:
    _, compact, plan = shared_pair(2, "qkvo", tied=True)
    for parameter in compact.parameters():  # .to(dtype) would also round the rotary frequencies
        parameter.data = parameter.data.to(dtype)
    expected = compact(tokens()).logits
    compact.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert isinstance(loaded, SharedLlamaForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.plan == plan
    assert torch.equal(loaded.eval()(tokens()).logits, expected)


def test_storage_of_o_is_transposed_after_every_way_to_get_a_model(tmp_path: Path) -> None:
    _, compact, _ = shared_pair(2, "qkvo")
    compact.save_pretrained(tmp_path)
    fresh = SharedLlamaForCausalLM(compact.config)
    loaded = SharedLlamaForCausalLM.from_pretrained(tmp_path)
    for model in (compact, fresh, loaded):
        for layer in model.model.layers:
            assert layer.self_attn.o_proj.weight.t().is_contiguous()


def test_a_copy_reads_its_own_weights() -> None:
    _, compact, _ = shared_pair(6, "qkvo")
    twin = copy.deepcopy(compact)
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.zero_()
    assert float(twin(tokens()).logits.abs().max()) > 0.1
    for layer in twin.model.layers:
        for p in "qkvo":
            for piece in getattr(layer.self_attn, f"{p}_proj").pieces:
                assert any(piece.owner is module for module in twin.modules())


def test_every_weight_is_held_once() -> None:
    _, compact, _ = shared_pair(6, "qkvo")
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in compact.parameters()}
    held = sum(p.untyped_storage().nbytes() for p in compact.parameters())
    assert held == 4 * sum(p.numel() for p in compact.parameters())
    assert len(storages) >= sum(p.numel() > 0 for p in compact.parameters())
    assert not list(compact.buffers()) or all(b.numel() < 100 for b in compact.buffers())


def test_projections_are_linear_layers_that_peft_can_find() -> None:
    _, compact, _ = shared_pair(6, "qkvo")
    attention = compact.model.layers[2].self_attn
    for p in "qkvo":
        projection = getattr(attention, f"{p}_proj")
        assert isinstance(projection, torch.nn.Linear)
        expected = (60, 36) if p != "o" else (36, 60)
        assert (projection.out_features, projection.in_features) == expected


# One token of one sequence takes another way through the projections than several rows do.


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, False, 1e-5),
        (torch.float64, False, 1e-5),  # the rotary table is fp32
        (torch.bfloat16, False, 0.1),
        (torch.float32, True, 0.1),
    ],
)
def test_one_token_a_row(rows: int, dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    model, compact, _ = shared_pair(2, "qkvo")
    compact(tokens(rows, 1))  # before the weights change, as a cache of them would notice
    for one in (model, compact):
        one.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(tokens(rows, 1)).logits
        got = compact(tokens(rows, 1)).logits
        set_packed_(compact, False)
        with torch.no_grad():
            assert torch.equal(compact(tokens(rows, 1)).logits, got)
        with torch.inference_mode():
            assert torch.equal(compact(tokens(rows, 1)).logits, got)
        set_packed_(compact, True)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                packed = compact(tokens(rows, 1)).logits
            # The order of sums differs where o owns all columns, which are stored transposed.
            atol = tolerance if dtype == torch.float32 else 0
            torch.testing.assert_close(packed, expected, rtol=0, atol=atol)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("projections", ["q", "o", "qkvo"])
def test_gradients_of_one_row_are_half_of_those_of_two_equal_rows(projections: str) -> None:
    gradients = []
    for rows in (1, 2):
        _, compact, _ = shared_pair(2, projections)
        for layer in compact.model.layers:
            for p in "qkvo":
                projection = getattr(layer.self_attn, f"{p}_proj")
                generator = torch.Generator().manual_seed(1)
                x = torch.randn(1, 1, projection.in_features, generator=generator)
                projection(x.expand(rows, -1, -1)).square().sum().backward()
        gradients.append([p.grad for n, p in compact.named_parameters() if "self_attn" in n])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(2 * one, two, rtol=1e-4, atol=1e-5)


def test_replaced_weights_are_read_by_all_their_readers() -> None:
    _, other, _ = shared_pair(6, "qkvo")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with torch.inference_mode():
        expected = other(tokens(1, 1)).logits
    weights = other.state_dict()

    def assign(compact: SharedLlamaForCausalLM) -> None:
        compact.load_state_dict(weights, assign=True)

    def copy_into(compact: SharedLlamaForCausalLM) -> None:
        compact.load_state_dict(weights)

    def data(compact: SharedLlamaForCausalLM) -> None:
        for name, parameter in compact.named_parameters():
            parameter.data = weights[name].clone()

    def parameters(compact: SharedLlamaForCausalLM) -> None:
        for name, module in compact.named_modules():
            if f"{name}.weight" in weights:
                module.weight = torch.nn.Parameter(weights[f"{name}.weight"].clone())

    for replace in (assign, copy_into, data, parameters):
        _, compact, _ = shared_pair(6, "qkvo")
        with torch.inference_mode():
            assert not torch.allclose(compact(tokens(1, 1)).logits, expected, atol=1e-2)
        replace(compact)
        with torch.inference_mode():
            got = compact(tokens(1, 1)).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=replace.__name__)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_decodes_with_its_own_weights(duplicate) -> None:
    _, compact, _ = shared_pair(6, "qkvo")
    expected = compact(tokens(1, 1)).logits
    twin = duplicate(compact)
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.zero_()
    assert torch.equal(twin(tokens(1, 1)).logits, expected)


def test_any_leading_shape() -> None:
    _, compact, _ = shared_pair(2, "qkvo")
    for p in "qkvo":
        projection = getattr(compact.model.layers[2].self_attn, f"{p}_proj")
        x = torch.randn(2, 3, projection.in_features)
        y = projection(x)
        assert y.shape == (2, 3, projection.out_features)
        torch.testing.assert_close(projection(x[0, 0]), y[0, 0])
        torch.testing.assert_close(projection(x[:1, :1]), y[:1, :1])
        torch.testing.assert_close(projection(x.transpose(0, 1)), y.transpose(0, 1))
        assert projection(x[:0]).shape == (0, 3, projection.out_features)


@pytest.mark.parametrize("rows_and_length", [(2, 9), (1, 1)])
def test_compile_gives_the_same_logits(rows_and_length: tuple[int, int]) -> None:
    _, compact, _ = shared_pair(2, "qkvo")
    compiled = torch.compile(compact, backend="eager", fullgraph=True)
    ids = tokens(*rows_and_length)
    difference = (compiled(ids).logits - compact(ids).logits).abs().max()
    assert float(difference) <= 1e-5
