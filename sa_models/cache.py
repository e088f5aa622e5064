"""The KV cache of a model with spans: every layer holds only what it reads.

A leader holds keys and values as always. A follower of an ``attention`` span holds values, with
keys of width 0, so that everything transformers does to a cache (beam search, cropping, offloading)
works on it unchanged. A follower of a ``kv`` span holds nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, LlamaConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, StaticLayer

from .errors import PostshareError
from .plan import SharingPlan


class ValuesLayer(DynamicLayer):
    """A growing cache layer with values alone; its keys have width 0."""

    def get_seq_length(self) -> int:
        # DynamicLayer counts keys, and takes tensors without elements for an empty cache.
        return 0 if self.values is None or not self.values.numel() else self.values.shape[-2]


def fit_cache_(cache: Cache, plan: SharingPlan, layers: int) -> None:
    """Give every layer the cache layer that it needs, in place. Leaves a fitted cache as it is.

    Args:
        cache: a dynamic or static cache, empty or filled by a model of this very plan.

    Raises:
        PostshareError: the cache holds tokens of a model with other spans, has another number of
            layers, or is of a kind that spans do not support (quantized, sliding window).
    """
    if not plan.spans:
        return
    if cache.layer_class_to_replicate is not None:
        missing = layers - len(cache.layers)
        cache.layers += [cache.layer_class_to_replicate() for _ in range(missing)]
    if len(cache.layers) != layers:
        raise PostshareError(
            f"the cache has {len(cache.layers)} layers, the model {layers}; make the cache from "
            "the model's config"
        )
    span_of = plan.leader_of()
    for layer, held in enumerate(cache.layers):
        if type(held) not in (DynamicLayer, StaticLayer, ValuesLayer, DummyLayer):
            raise PostshareError(
                f"a model with spans cannot use a cache of {type(held).__name__}; use a "
                "DynamicCache or a StaticCache"
            )
        share = span_of[layer].share if layer in span_of else None
        fitting = _fitting(held, share, cache.layers[0])
        if fitting is held:
            continue
        if cache.get_seq_length() > 0:
            raise PostshareError(
                f"layer {layer} of the cache was filled by a model with other spans; pass a "
                "cache that this model filled, or an empty one"
            )
        cache.layers[layer] = fitting


def _fitting(held: Any, share: str | None, first: Any) -> Any:
    """The cache layer of a layer that follows in a span of ``share``: ``held`` where it fits.

    Args:
        first: the cache layer of layer 0, which follows nobody: it tells static from dynamic.
    """
    if share == "kv":
        return held if isinstance(held, DummyLayer) else DummyLayer()
    if isinstance(first, StaticLayer):
        fits = isinstance(held, StaticLayer) and (
            held.keys is None or (held.keys.shape[-1] == 0) == (share == "attention")
        )
        return held if fits else StaticLayer(first.max_cache_len)
    kind = ValuesLayer if share == "attention" else DynamicLayer
    return held if type(held) is kind else kind()


def cache_bytes(
    plan: SharingPlan,
    config: LlamaConfig,
    batch: int,
    length: int,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes that the KV cache of a model with this plan takes.

    Args:
        config: of the base or of the converted model.
        batch: sequences (with beam search, times the beams).
        length: tokens in the cache; for a static cache its length.
        dtype: of keys and values; None: the config's.
    """
    chosen = dtype or config.dtype or torch.get_default_dtype()
    assert isinstance(chosen, torch.dtype)  # a config turns a name into the dtype
    return plan.savings(config).stored_cache * batch * length * chosen.itemsize


__all__ = ["ValuesLayer", "cache_bytes", "fit_cache_"]
