"""The KV cache of a model with spans: same logits as without, in the bytes that are promised."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedCache,
    StaticLayer,
)

from sa_models import AttentionSpan, PostshareError, SharingPlan, cache_bytes
from sa_models.cache import fit_cache_
from tests.support.reference import (
    PLANS,
    SPAN_PLANS,
    Reference,
    dense,
    shared,
    some_plan,
    tokens,
    use,
)
from tests.support.transformers_versions import has_fp8_cache, reset_empties


@lru_cache
def model_of(kind: str, shape: str = "gqa") -> Any:
    return use(shared(dense(shape), some_plan(kind, shape)))


@lru_cache
def expected_of(kind: str) -> torch.Tensor:
    with torch.no_grad():
        return Reference.of(dense(), some_plan(kind, "gqa"))(tokens(2, 12)).logits


def make_cache(kind: str, model: Any, length: int = 16) -> Cache | None:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "plain": lambda: DynamicCache(),
        "none": lambda: None,  # the model's own
    }[kind]()


CACHES = ["dynamic", "plain", "static", "none"]


@torch.no_grad()
def in_chunks(model: Any, cache: Cache | None, chunks: list[int]) -> torch.Tensor:
    """Logits of twelve tokens, computed some at a time into the cache."""
    logits, ids = [], tokens(2, 12)
    for part in ids.split(chunks, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", PLANS)
def test_logits_with_a_cache(kind: str, cache: str, implementation: str) -> None:
    """One token, several, and as many as replay takes, on top of what is cached."""
    for reuse_rows in (0, 3):
        model = use(model_of(kind), implementation, reuse_rows)
        computed = in_chunks(model, make_cache(cache, model), [4, 1, 3, 1, 1, 2])
        assert (computed - expected_of(kind)).abs().max() <= 1e-5


def stored_bytes(cache: Cache) -> int:
    """Of the memory behind keys and values."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("shape", "dtype"), [("mha", torch.bfloat16), ("gqa", torch.float32)])
@torch.no_grad()
def test_bytes_are_those_that_are_predicted(shape: str, cache: str, dtype: torch.dtype) -> None:
    for kind in PLANS:
        plan = some_plan(kind, shape)
        base = dense(shape)
        model = use(shared(base, plan)).to(dtype)
        length = 16 if cache == "static" else 9
        out = model(tokens(3), past_key_values=make_cache(cache, model), use_cache=True)
        taken = stored_bytes(out.past_key_values)
        assert taken == cache_bytes(plan, base.config, 3, length, dtype)
        assert taken == cache_bytes(plan, model.config, 3, length, dtype)
        # One token more grows a dynamic cache by one token, and a static one not at all.
        out = model(tokens(3, 1), past_key_values=out.past_key_values)
        length = 16 if cache == "static" else 10
        assert stored_bytes(out.past_key_values) == cache_bytes(plan, base.config, 3, length, dtype)


def test_bytes_by_hand() -> None:
    """Six layers, four KV heads of 4: 32 elements a token and layer."""
    config = dense().config
    config.dtype = torch.bfloat16
    spans = (AttentionSpan(0, (1, 2)), AttentionSpan(3, (4,), "kv"))
    assert cache_bytes(SharingPlan(), config, 2, 10) == 6 * 32 * 20 * 2
    assert cache_bytes(SharingPlan(spans=spans), config, 2, 10) == (3 * 32 + 2 * 16) * 20 * 2
    pooled = SharingPlan(kv_heads=1, spans=spans)
    assert cache_bytes(pooled, config, 2, 10, torch.float32) == (3 * 8 + 2 * 4) * 20 * 4


# --- what is done to caches -----------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "plain"])
@pytest.mark.parametrize("kind", SPAN_PLANS)
@torch.no_grad()
def test_cropping_goes_back(kind: str, cache: str) -> None:
    model = model_of(kind)
    filled = model(tokens(2, 8), past_key_values=make_cache(cache, model)).past_key_values
    assert filled.get_seq_length() == 8
    assert getattr(filled, "is_croppable", True)  # before 5.21 every cache was
    filled.crop(-3)
    assert filled.get_seq_length() == 5
    out = model(tokens(2, 12)[:, 5:], past_key_values=filled)
    assert (out.logits - expected_of(kind)[:, 5:]).abs().max() > 1e-3  # other tokens went before
    again = model(tokens(2, 12)[:, :8], past_key_values=make_cache(cache, model)).past_key_values
    again.crop(-3)
    out = model(tokens(2, 12)[:, 5:], past_key_values=again)
    assert (out.logits - expected_of(kind)[:, 5:]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", SPAN_PLANS)
@torch.no_grad()
def test_reordering_repeating_selecting_and_copying(kind: str) -> None:
    model = model_of(kind)
    expected = expected_of(kind)[:, 11]

    def filled() -> Cache:
        return model(tokens(2, 12)[:, :11]).past_key_values

    def last(cache: Cache, order: list[int]) -> torch.Tensor:
        return model(tokens(2, 12)[order, 11:], past_key_values=cache).logits[:, 0]

    cache = filled()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert (last(cache, [1, 0]) - expected[[1, 0]]).abs().max() <= 1e-5
    cache = filled()
    cache.batch_repeat_interleave(2)
    twin = copy.deepcopy(cache)
    assert (last(cache, [0, 0, 1, 1]) - expected[[0, 0, 1, 1]]).abs().max() <= 1e-5
    twin.batch_select_indices(torch.tensor([2]))
    assert (last(twin, [1]) - expected[1:]).abs().max() <= 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "plain", "static"])
@pytest.mark.parametrize("kind", SPAN_PLANS)
@torch.no_grad()
def test_a_cache_can_be_reset_and_used_again(kind: str, cache: str) -> None:
    model = model_of(kind)
    used = make_cache(cache, model)
    in_chunks(model, used, [5, 7])
    assert used is not None
    used.reset()
    if not reset_empties() and cache != "static":
        pytest.skip("this version of transformers keeps the length of a growing cache")
    assert int(used.get_seq_length()) == 0
    assert (in_chunks(model, used, [4, 8]) - expected_of(kind)).abs().max() <= 1e-5


@torch.no_grad()
def test_a_static_cache_that_was_initialized_early() -> None:
    """With full keys everywhere, as transformers does before it compiles the prefill."""
    for kind in ("sa", "cla", "both"):
        model = model_of(kind)
        cache = StaticCache(config=model.config, max_cache_len=16)
        cache.early_initialization(2, 4, 4, torch.float32, torch.device("cpu"))
        computed = in_chunks(model, cache, [5, 7])
        assert (computed - expected_of(kind)).abs().max() <= 1e-5
        expected = cache_bytes(some_plan(kind, "gqa"), dense().config, 2, 16, torch.float32)
        assert stored_bytes(cache) == expected


def test_fitting_twice_changes_nothing() -> None:
    for kind in CACHES[:3]:
        cache = make_cache(kind, model_of("both"))
        assert cache is not None
        fit_cache_(cache, some_plan("both", "gqa"), model_of("both").model.layout)
        layers = list(cache.layers)
        fit_cache_(cache, some_plan("both", "gqa"), model_of("both").model.layout)
        assert [id(layer) for layer in cache.layers] == [id(layer) for layer in layers]


# --- caches that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["sa", "cla", "both"])
@torch.no_grad()
def test_a_cache_that_a_dense_model_filled(kind: str, cache: str) -> None:
    base = dense()
    filled = base(tokens(), past_key_values=make_cache(cache, base)).past_key_values
    with pytest.raises(PostshareError, match="with other spans; pass a cache"):
        model_of(kind)(tokens(2, 1), past_key_values=filled)


OTHER_SPANS = [
    AttentionSpan(1, (2, 3)),
    AttentionSpan(1, (2,)),
    AttentionSpan(1, (2, 3), "kv"),
    AttentionSpan(1, (2,), "kv"),
    AttentionSpan(4, (5,)),
]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_cache_of_a_model_with_other_spans(cache: str) -> None:
    """Filled it is refused, empty it is fitted anew; a model never reads what is not there."""
    models = [use(shared(dense(), SharingPlan(spans=(span,)))) for span in OTHER_SPANS]
    expected = [model(tokens()).logits for model in models]
    for filler in models:
        for reader, logits in zip(models, expected, strict=True):
            filled = make_cache(cache, filler)
            assert filled is not None
            filler(tokens(), past_key_values=filled)
            if reader is filler:
                reader(tokens(2, 1), past_key_values=filled)
                continue
            with pytest.raises(PostshareError, match="filled by a model with other spans"):
                reader(tokens(2, 1), past_key_values=filled)
            empty = make_cache(cache, filler)
            assert empty is not None
            fit_cache_(empty, filler.model.plan, filler.model.layout)
            again = reader(tokens(), past_key_values=empty)
            assert (again.logits - logits).abs().max() <= 1e-5
            assert type(empty.layers[0]) in (DynamicLayer, StaticLayer)
            assert empty.is_compileable == (cache == "static")


@pytest.mark.skipif(not has_fp8_cache(), reason="this version of transformers has no fp8 cache")
def test_quantized_caches() -> None:
    model = model_of("sa")
    with pytest.raises(PostshareError, match=r"cannot use a cache of .*; use a DynamicCache"):
        model(tokens(), past_key_values=QuantizedCache("fp8", model.config))
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    with pytest.raises(PostshareError, match="cannot use a cache of Fp8QuantizedLayer"):
        model.generate(tokens(), max_new_tokens=2, **options)
    # Without spans nothing is fitted, and every cache of the library works.
    use(shared(dense(), some_plan("pooled", "gqa"))).generate(tokens(), max_new_tokens=2, **options)


def test_kinds_of_cache_that_spans_do_not_support() -> None:
    model = model_of("sa")
    sliding = DynamicCache(config=model.config)
    sliding.layers = [DynamicSlidingWindowLayer(4) for _ in range(6)]
    with pytest.raises(PostshareError, match=r"cannot use a cache of .*; use a DynamicCache"):
        model(tokens(), past_key_values=sliding)
    model.generate(tokens(), max_new_tokens=2)


def test_a_cache_with_too_few_layers() -> None:
    small = dense(num_hidden_layers=2)
    for cache in (DynamicCache(config=small.config), StaticCache(small.config, max_cache_len=16)):
        with pytest.raises(PostshareError, match="cache has 2 layers, the model 6"):
            model_of("sa")(tokens(), past_key_values=cache)
