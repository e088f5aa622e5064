"""Compact models with spans or dropped layers in vLLM, through its Transformers modeling backend.

All others: :mod:`~sa_models.serving.vllm_packed`, but in a vLLM that knows one number of heads. The
backend runs our own :class:`~sa_models.modeling.SharedLlamaModel` on flattened batches and puts
its paged attention behind ``ALL_ATTENTION_FUNCTIONS``. Three things differ from a stock Llama:

- Projections read rows of one another, so that they stay our modules instead of vLLM's.
- A layer may have fewer heads than the config says: each gets a KV cache of its own size. A dropped
  layer has none.
- Followers of a ``kv`` span read the cache of their leader and have none, where all caches are of
  one size and heads are not mapped; else they keep a copy. Those of an ``attention`` span replay:
  paged kernels give no attention weights away, so the follower's cache holds the leader's keys
  beside its own values. Weights are saved, the key cache is not.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM

from sa_models.attention import SharedAttention
from sa_models.configuration import SharedLlamaConfig
from sa_models.modeling import SharedLlamaModel
from sa_models.serving.vllm_plugin import check_supported


class ServedSharedLlama(TransformersForCausalLM):
    """A compact export in vLLM: one device, eager, weights as they are exported."""

    model: SharedLlamaModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_supported(vllm_config)
        config = vllm_config.model_config.hf_config
        assert isinstance(config, SharedLlamaConfig)
        config.reuse_rows = 0  # rows are those of many sequences: see the module's docstring
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _decorate_for_torch_compile(self) -> None:
        """Eager: what a layer hands to its followers is no tensor of a stock layer's."""

    @property
    def attentions(self) -> list[SharedAttention]:
        """Of all layers, in their order."""
        return [cast(SharedAttention, layer.self_attn) for layer in self.model.layers]

    def recursive_replace(self) -> None:
        """As in vLLM, but for attention modules, which are set aside."""
        attentions = self.attentions
        for layer in self.model.layers:
            layer.self_attn = nn.Identity()
        super().recursive_replace()
        for layer, attention in zip(self.model.layers, attentions, strict=True):
            layer.self_attn = attention

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Give each layer vLLM's attention with the heads that it has, and its KV cache."""
        start = f"{prefix}." if prefix else ""
        attentions, spans = self.attentions, self.model.spans
        names = [f"{start}model.layers.{i}.self_attn.attn" for i in range(len(attentions))]
        heads = [_heads(each) for each in attentions]
        groups = [each.num_key_value_groups for each in attentions]
        kv_heads = [count // group for count, group in zip(heads, groups, strict=True)]
        # vLLM (0.32, 0.33) knows no layers that read others' caches where caches differ in size.
        alike = len(set(kv_heads) - {0}) == 1
        for at, (attention, span) in enumerate(zip(attentions, spans, strict=True)):
            if attention.is_dropped:
                continue
            # A mapped follower reads other heads than the leader's cache has: it keeps its own.
            reads = alike and attention.follows == "kv" and attention.head_map is None
            attention.attn = Attention(
                num_heads=heads[at],
                num_kv_heads=kv_heads[at],
                head_size=attention.head_dim,
                scale=attention.scaling,
                cache_config=self.cache_config,
                prefix=names[at],
                kv_sharing_target_layer_name=names[span.leader] if span and reads else None,
            )


def _heads(attention: SharedAttention) -> int:
    """Query heads that a layer has; none where it is dropped."""
    return 0 if attention.is_dropped else attention.o_proj.in_features // attention.head_dim
