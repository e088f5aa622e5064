"""Models with spans against stock transformers Llama on the same weights: decode and training.

Model: hidden 1024, 16 layers (8 for training), 16 heads, random weights. Both sides get
preallocated (static) caches that are filled with random keys and values, since only the time of one
more token is measured; the growing (dynamic) caches are reported too. Stock is the faster of eager
and sdpa.

The ideal speed-up of a token is (bytes of weights and cache that stock reads) / (those that the
span model must read).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from timing import PeakMemory, interleaved, once
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from sa_models.cache import cache_bytes, fit_cache_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.spans import AttentionSpan
from sa_models.weights.structure import convert

LAYERS = 16
TRAINED_LAYERS = 8  # a step of 4 x 1,024 tokens takes half a minute as it is
SPARE = 8  # places of a static cache beyond the context
DECODING = {"1x1024": (1, 1024, 41), "8x4096": (8, 4096, 7)}
LENGTHS = (512, 1024, 2048, 4096)


def every_other_follows(layers: int) -> SharingPlan:
    return SharingPlan(
        spans=tuple(AttentionSpan(leader, (leader + 1,)) for leader in range(0, layers, 2))
    )


def stock_model(dtype: torch.dtype, layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        max_position_embeddings=4096 + SPARE,
        tie_word_embeddings=True,
    )
    config.dtype = dtype
    return LlamaForCausalLM(config).to(dtype).eval()


def filled(model: PreTrainedModel, plan: SharingPlan, cache: Cache, batch: int, length: int):
    """The cache with random content, as after a prompt of that length."""
    config = model.config
    fit_cache_(cache, plan, plan.layout(config))
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    followers = plan.leader_of()
    for layer in range(LAYERS):
        values = torch.randn(shape, dtype=config.dtype)
        keys = values[..., :0] if layer in followers else torch.randn(shape, dtype=config.dtype)
        cache.update(keys, values, layer)
    return cache


def decoder(model: PreTrainedModel, cache: Cache, batch: int, length: int) -> Callable[[], object]:
    """One token after the context; the cache is put back each time."""
    token = torch.zeros(batch, 1, dtype=torch.long)
    mask = torch.ones(batch, length + 1, dtype=torch.long)
    static = isinstance(cache, StaticCache)

    def step() -> None:
        model(token, attention_mask=mask, past_key_values=cache, use_cache=True)
        if static:
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)
        else:
            cache.crop(-1)

    return step


@torch.inference_mode()
def measure_decode(
    stock: LlamaForCausalLM, plan: SharingPlan, batch: int, length: int, rounds: int, static: bool
) -> dict[str, float]:
    spans: SharedLlamaForCausalLM
    if plan.spans:
        spans = convert(stock, plan)  # type: ignore[assignment]
    else:
        spans = SharedLlamaForCausalLM.from_materialized(stock, plan)
    empty = SharingPlan()

    def cache(config: LlamaConfig) -> Cache:
        longest = length + SPARE
        return StaticCache(config, max_cache_len=longest) if static else DynamicCache(config=config)

    dense_cache = filled(stock, empty, cache(stock.config), batch, length)
    span_cache = filled(spans, plan, cache(spans.config), batch, length)
    stock_step = decoder(stock, dense_cache, batch, length)

    def stock_as(implementation: str) -> Callable[[], object]:
        def step() -> None:
            stock.config._attn_implementation = implementation
            stock_step()

        return step

    times = interleaved(
        rounds,
        eager=stock_as("eager"),
        sdpa=stock_as("sdpa"),
        spans=decoder(spans, span_cache, batch, length),
    )
    element = stock.dtype.itemsize
    held = {
        name: sum(p.numel() for p in model.parameters()) * element
        for name, model in (("stock", stock), ("spans", spans))
    }
    read = {
        name: held[name] + cache_bytes(p, stock.config, batch, length, stock.dtype)
        for name, p in (("stock", empty), ("spans", plan))
    }
    allocated = sum(layer.keys.nbytes + layer.values.nbytes for layer in span_cache.layers)
    predicted = cache_bytes(plan, stock.config, batch, length + SPARE * static, stock.dtype)
    assert allocated == predicted, (allocated, predicted)
    fastest = min(times["eager"], times["sdpa"])
    ideal = read["stock"] / read["spans"]
    return {
        "seconds_stock_eager": times["eager"],
        "seconds_stock_sdpa": times["sdpa"],
        "seconds_spans": times["spans"],
        "speedup": fastest / times["spans"],
        "ideal_speedup": ideal,
        "share_of_ideal": fastest / times["spans"] / ideal,
        "cache_bytes": allocated,
        "map_bytes": batch * stock.config.num_attention_heads * length * element,
    }


def training_step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def peak_bytes(spans: bool, length: int) -> int:
    """Anonymous memory of a training step above that of the model; in a process of its own, as the
    C library keeps what a step before has freed."""
    model: PreTrainedModel = stock_model(torch.float32, TRAINED_LAYERS)
    if spans:
        model = convert(model, every_other_follows(TRAINED_LAYERS))
    gc.collect()
    with PeakMemory() as memory:
        training_step(model, torch.randint(0, 4096, (1, length)))
    return memory.peak


def measure_training(stock: LlamaForCausalLM, rounds: int) -> dict[str, float]:
    result: dict[str, float] = {}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for length in LENGTHS:
            peaks = [fresh.submit(peak_bytes, spans, length).result() for spans in (False, True)]
            result[f"peak_bytes_stock_{length}"], result[f"peak_bytes_spans_{length}"] = peaks
            result[f"peak_spans_over_stock_{length}"] = peaks[1] / peaks[0]
    spans = convert(stock, every_other_follows(TRAINED_LAYERS))
    ids = torch.randint(0, 4096, (4, 1024))
    times: dict[str, list[float]] = {"stock": [], "spans": []}
    for _ in range(rounds):
        for name, model in (("stock", stock), ("spans", spans)):
            times[name].append(once(lambda m=model, i=ids: training_step(m, i)))
    seconds = {name: min(values) for name, values in times.items()}
    return result | {
        "seconds_stock": seconds["stock"],
        "seconds_spans": seconds["spans"],
        "spans_over_stock": seconds["spans"] / seconds["stock"],
    }


def measure(names: tuple[str, ...] = ("float32", "bfloat16")) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    followers = every_other_follows(LAYERS)
    for name in names:
        stock = stock_model(getattr(torch, name))
        for where, (batch, length, rounds) in DECODING.items():
            for kind, static in (("static", True), ("dynamic", False)):
                key = f"spans_decode_{where}_{kind}_{name}"
                results[key] = measure_decode(stock, followers, batch, length, rounds, static)
        results[f"spans_none_{name}"] = measure_decode(stock, SharingPlan(), 1, 1024, 41, True)
    results["spans_training_float32"] = measure_training(
        stock_model(torch.float32, TRAINED_LAYERS), 2
    )
    return results


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
