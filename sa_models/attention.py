"""Attention of leaders and followers: what a layer computes itself, and what it takes over.

Shared Attention has two ways to one result. *Replay*: a follower calls the attention kernel with
the leader's queries and keys and its own values, which is exactly SA (2407.12866): no map is ever
formed, so it suits many query rows. *Reuse*: the leader forms its attention weights and followers
multiply them with their values: neither queries nor keys are read again, so it suits few rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    eager_attention_forward,
    repeat_kv,
    rotate_half,
)

from .basis import FACTORED
from .plan import SharingPlan
from .projections import SharedBasisLinear, SharedLinear, SharedOutputLinear

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the rotary embedding, each (batch, rows, head_dim)."""


class SharedAttention(nn.Module):
    """The attention of one layer under a plan, over the heads that are not removed.

    That of a dropped layer has no projection and no cache: it gives zeros.

    A follower of an ``attention`` span has no q_proj and k_proj, one of a ``kv`` span no k_proj and
    v_proj. ``leader`` in :meth:`forward` are the tensors that its leader handed on:

    ========================  ===================================================================
    span                      tensors
    ========================  ===================================================================
    ``kv``                    keys and values, (batch, KV heads, keys, head_dim)
    ``attention``, replay     queries (batch, heads, rows, head_dim) and keys
    ``attention``, reuse      attention weights, (batch, heads, rows, keys)
    ========================  ===================================================================
    """

    q_proj: SharedLinear | SharedBasisLinear
    k_proj: SharedLinear | SharedBasisLinear
    v_proj: SharedLinear | SharedBasisLinear
    o_proj: SharedOutputLinear

    def __init__(self, config: LlamaConfig, layer_idx: int, plan: SharingPlan) -> None:
        super().__init__()
        layout = plan.layout(config)
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = layout.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        span = plan.leader_of().get(layer_idx)
        self.follows = None if span is None else span.share
        self.leads = next((s.share for s in plan.spans if s.leader == layer_idx), None)
        self.head_map = None if span is None else span.map_of(layer_idx)
        self.group = layout.heads_per_unit
        kept = plan.kept_units(layout)[layer_idx]
        self.is_dropped = not kept
        held = layout.with_units(len(kept))
        # Read by the attention kernels; see _paired.
        mapped = self.follows == "attention" and self.head_map is not None
        self.num_key_value_groups = 1 if mapped else self.group
        for p, units in plan.own_units(layout)[layer_idx].items():
            rows, columns = held.shape(p)
            if plan.basis is not None and p in FACTORED:
                first, rank = plan.basis.place(layer_idx, p)
                factors = SharedBasisLinear(columns, rows, rank, owns_basis=first == layer_idx)
                setattr(self, f"{p}_proj", factors)
                continue
            own = len(units) * layout.width(p)
            kind, shape = (
                (SharedOutputLinear, (rows, own)) if p == "o" else (SharedLinear, (own, columns))
            )
            setattr(self, f"{p}_proj", kind(columns, rows, torch.empty(shape)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        leader: tuple[torch.Tensor, ...],
        reuse: bool,
        position_embeddings: Rotation,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """(batch, rows, hidden) -> the same, attention weights where formed, and what is handed on.

        Args:
            reuse: whether SA spans pass attention weights on, instead of queries and keys.
            attention_mask: as transformers makes it for the attention implementation.
        """
        handed: tuple[torch.Tensor, ...] = ()
        weights: torch.Tensor | None
        if self.is_dropped:
            return *self._nothing(hidden_states), handed
        if self.follows == "attention":
            value = self._heads(self.v_proj(hidden_states))
            if past_key_values is not None:
                no_keys = value.new_empty(*value.shape[:-1], 0)
                _, value = past_key_values.update(no_keys, value, self.layer_idx)
            if reuse:
                weights = self._mapped(leader[0])
                output = mix_values(weights, value)
            else:
                paired = self._paired(leader[0], leader[1], value)
                output, weights = self._kernel(*paired, attention_mask, **kwargs)
            return self.o_proj(self._flat(output, hidden_states)), weights, handed

        query = self._heads(self.q_proj(hidden_states))
        if self.follows == "kv":
            query = rotate(query, position_embeddings)
            key, value = map(self._mapped, leader)
        else:
            key = self._heads(self.k_proj(hidden_states))
            query, key = self.rotated(query, key, position_embeddings)
            value = self._heads(self.v_proj(hidden_states))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        if self.leads == "attention" and reuse:
            weights = attention_weights(query, key, attention_mask, self.scaling)
            output, handed = mix_values(weights, value), (weights,)
        else:
            output, weights = self._kernel(query, key, value, attention_mask, **kwargs)
            if self.leads is not None:
                handed = (query, key) if self.leads == "attention" else (key, value)
        return self.o_proj(self._flat(output, hidden_states)), weights, handed

    def rotated(
        self, query: torch.Tensor, key: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, (batch, heads, rows, head_dim), with the rotary embedding.

        A training may give the instance another one, that does both at once.
        """
        return rotate(query, rotation), rotate(key, rotation)

    def _nothing(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Zeros that take no memory; where others form attention weights, those of no head."""
        forms_weights = self.config._attn_implementation == "eager"
        weights = x.new_empty(len(x), 0, x.shape[-2], x.shape[-2]) if forms_weights else None
        return x.new_zeros(()).expand(x.shape), weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, rows, heads * head_dim) -> (batch, heads, rows, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _flat(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(batch, rows, heads * head_dim) of what a kernel gives; vLLM's gives no batch."""
        return output.reshape(*rows.shape[:-1], -1)

    def _kernel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention implementation of the config; its output is (batch, rows, heads, dim)."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

    def _mapped(self, x: torch.Tensor) -> torch.Tensor:
        """The leader's heads (dimension 1) in the order in which this layer reads them."""
        return x if self.head_map is None else x[:, list(self.head_map)]

    def _paired(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The leader's queries and keys for this layer's heads, and its own values to go with."""
        if self.head_map is None:
            return query, key, value
        # Query head h reads the keys of one head's group and the values of another's, so that with
        # GQA each query head gets keys and values of its own.
        key = key[:, [head // self.group for head in self.head_map]]
        return self._mapped(query), key, repeat_kv(value, self.group)


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotary embedding of queries or keys, (batch, heads, rows, head_dim)."""
    cos, sin = rotation
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def is_readable(mask: Any, rows: int, implementation: str) -> bool:
    """Whether :func:`attention_weights` can apply the mask that transformers made.

    Not those of flex; and where there is none, several rows are causal from the first key on in
    sdpa alone (flash counts from the last).
    """
    if mask is None:
        return rows == 1 or implementation == "sdpa"
    return isinstance(mask, torch.Tensor) and (mask.dim() == 4 or rows == 1)


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """softmax(q k^T) as (batch, heads, rows, keys), softmax in fp32, in the dtype of the queries.

    Args:
        query: (batch, heads, rows, head_dim).
        key: (batch, KV heads, keys, head_dim); no head is repeated for GQA.
        mask: a readable one: (batch, 1, rows, keys), added (float) or true where allowed (bool);
            (batch, keys), 0 or 1, for one row; None: row i sees the keys up to i, one row all.
    """
    batch, heads, rows, _ = query.shape
    grouped = (query * scaling).reshape(batch, key.shape[1], -1, query.shape[-1])
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, rows, -1)
    keys = scores.shape[-1]
    if mask is None and rows > 1:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril()
    elif mask is not None and mask.dim() == 2:  # flash; shorter than a static cache
        mask = functional.pad(mask.bool(), (0, keys - mask.shape[1]))[:, None, None]
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # in place: the map is large
    elif mask is not None:
        scores += mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)


def mix_values(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention weights times values, (batch, rows, heads, head_dim).

    Args:
        weights: (batch, heads, rows, keys).
        value: (batch, KV heads, keys, head_dim); no head is repeated for GQA.
    """
    batch, heads, rows, keys = weights.shape
    mixed = torch.matmul(weights.reshape(batch, value.shape[1], -1, keys), value)
    return mixed.view(batch, heads, rows, -1).transpose(1, 2)
