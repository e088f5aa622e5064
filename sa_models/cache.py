"""The KV cache of a shared model: every layer holds only what it reads.

A leader holds keys and values as always. A follower of an ``attention`` span holds values, with
keys of width 0, so that everything transformers does to a cache (beam search, cropping, offloading)
works on it unchanged. A follower of a ``kv`` span holds nothing. A layer with removed units holds
the KV heads that are left: cache layers take their number as it comes, unless transformers has
allocated them before. A dropped layer holds nothing, as a follower of keys and values; what
transformers asks of a cache, its length and its mask, it asks of the first layer that holds any.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import Cache, LlamaConfig
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .errors import PostshareError
from .heads import HeadLayout
from .plan import SharingPlan

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # before 5.23

    class DummyLayer:  # type: ignore[no-redef]
        """A layer that holds nothing, as transformers has it from 5.23 on."""

        supports_early_init = False
        is_compileable = is_croppable = is_initialized = True
        is_sliding = False
        keys = values = None

        def get_max_length(self) -> int:
            return -1

        def _nothing(self, *_: Any) -> None: ...

        offload = prefetch = reset = crop = _nothing
        reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing


CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"
"""What transformers calls the cache of a model's call and outputs: ``cache`` from 5.24 on."""


class ValuesLayer(DynamicLayer):
    """A growing cache layer with values alone; its keys have width 0."""

    def get_seq_length(self) -> int:
        # DynamicLayer counts keys, and takes tensors without elements for an empty cache.
        return 0 if self.values is None or not self.values.numel() else self.values.shape[-2]


KINDS = (DynamicLayer, StaticLayer, ValuesLayer, DummyLayer)
"""Of cache layers that spans know."""


def fit_cache_(cache: Cache, plan: SharingPlan, layout: HeadLayout) -> None:
    """Give every layer the cache layer that it needs, in place. Leaves a fitted cache as it is.

    Args:
        cache: a dynamic or static cache, empty or filled by a model of this very plan.
        layout: with the plan's KV heads.

    Raises:
        PostshareError: the cache holds tokens of a model with other spans or other units, has
            another number of layers, or is of a kind that spans do not support (quantized, sliding
            window).
    """
    if not plan.spans and not plan.removed:
        return
    layers, removed = layout.layers, Counter(layer for layer, _ in plan.removed)
    if cache.layer_class_to_replicate is not None:
        missing = layers - len(cache.layers)
        cache.layers += [cache.layer_class_to_replicate() for _ in range(missing)]
    if len(cache.layers) != layers:
        raise PostshareError(
            f"the cache has {len(cache.layers)} layers, the model {layers}; make the cache from "
            "the model's config"
        )
    span_of, dropped = plan.leader_of(), plan.dropped(layout)
    first = cache.layers[min(set(range(layers)) - dropped)]
    for layer, held in enumerate(cache.layers):
        if layer not in dropped and type(held) not in KINDS:
            if not plan.spans:
                continue  # it holds keys and values as they come
            raise PostshareError(
                f"a model with spans cannot use a cache of {type(held).__name__}; use a "
                "DynamicCache or a StaticCache"
            )
        share = span_of[layer].share if layer in span_of else None
        holds = share != "kv" and layer not in dropped
        fitting = _fitting(held, share, holds, first, layout.kv_heads - removed[layer])
        if fitting is held:
            continue
        if cache.get_seq_length() > 0:
            what = " or ".join(n for n, v in (("spans", plan.spans), ("units", removed)) if v)
            raise PostshareError(
                f"layer {layer} of the cache was filled by a model with other {what}; pass a "
                "cache that this model filled, or an empty one"
            )
        cache.layers[layer] = fitting


def _fitting(held: Any, share: str | None, holds: bool, first: Any, kv_heads: int) -> Any:
    """The cache layer of a layer that follows in a span of ``share``: ``held`` where it fits.

    Args:
        holds: whether the layer holds anything.
        first: the cache layer of the first layer with attention, which follows nobody: it tells
            static from dynamic.
        kv_heads: that the layer has.
    """
    if not holds:
        return held if isinstance(held, DummyLayer) else DummyLayer()
    # (batch, KV heads, keys, head_dim) once the layer is allocated
    shape = None if held.keys is None or held.keys.dim() < 4 else held.keys.shape
    fits = shape is None or shape[1] == kv_heads
    if isinstance(first, StaticLayer):
        fits &= isinstance(held, StaticLayer)
        fits &= shape is None or (shape[-1] == 0) == (share == "attention")
        return held if fits else StaticLayer(first.max_cache_len)
    kind = ValuesLayer if share == "attention" else DynamicLayer
    return held if fits and type(held) is kind else kind()


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
