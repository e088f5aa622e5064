"""The KV cache of a model with spans: every layer holds only what it reads.

A leader holds keys and values as always. A follower of an ``attention`` span holds values, with
keys of width 0, so that everything transformers does to a cache (beam search, cropping, offloading)
works on it unchanged. A follower of a ``kv`` span holds nothing.
"""

from __future__ import annotations

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
    """Give every follower the cache layer that it needs, in place. Leaves a fitted cache as it is.

    Args:
        cache: a dynamic or static cache, empty or filled by a model of this very plan.

    Raises:
        PostshareError: the cache holds tokens of a model with other spans, or is of a kind that
            spans do not support (quantized, sliding window).
    """
    for layer, span in plan.leader_of().items():
        if len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
            missing = layers - len(cache.layers)
            cache.layers += [cache.layer_class_to_replicate() for _ in range(missing)]
        held = cache.layers[layer]
        if type(held) not in (DynamicLayer, StaticLayer, ValuesLayer, DummyLayer):
            raise PostshareError(
                f"a model with spans cannot use a cache of {type(held).__name__}; use a "
                "DynamicCache or a StaticCache"
            )
        fitting = _fitting(held, span.share)  # type: ignore[arg-type]  # one of these kinds
        if fitting is not held:
            if not isinstance(held, DummyLayer) and cache.get_seq_length(layer) > 0:
                raise PostshareError(
                    f"layer {layer} of the cache was filled by a model with other spans; pass a "
                    "cache that this model filled, or an empty one"
                )
            cache.layers[layer] = fitting


Layer = DynamicLayer | StaticLayer | DummyLayer


def _fitting(held: Layer, share: str) -> Layer:
    """The cache layer of a follower: ``held`` where it fits."""
    if share == "kv":
        return held if isinstance(held, DummyLayer) else DummyLayer()
    if isinstance(held, StaticLayer):
        has_keys = held.keys is not None and held.keys.shape[-1] > 0
        return StaticLayer(held.max_cache_len) if has_keys else held
    return held if isinstance(held, ValuesLayer) else ValuesLayer()


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
