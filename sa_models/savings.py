"""Arithmetic of what a sharing plan saves: heads, parameters, bytes, cache. No weights are needed.

This file imports no torch: it also travels inside compact exports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .heads import HeadLayout


@dataclass(frozen=True)
class PlanSavings:
    """What a plan saves on a model. Parameters are counted in elements, ratios are in [0, 1].

    Attributes:
        units, tied_units, removed_units: of the model with the plan's KV heads; heads likewise.
        attention_parameters, base_parameters: of the model before the plan.
        tied_parameters: no longer stored because they are another unit's.
        removed_unit_parameters: of the removed units.
        dropped_layers: all units of which are removed.
        dropped_norm_parameters: of the norms that these layers do not need.
        span_parameters: of the projections that followers do not have.
        pooled_parameters: of the KV heads that were pooled into others (GQA).
        basis_parameters: no longer stored because layers share a basis (Basis Sharing).
        base_cache, stored_cache: elements of the KV cache for one token.
        stock_units: that every layer of the dense form has, where each has lost as many, see
            :meth:`SharingPlan.stock_units`.
    """

    units: int
    tied_units: int
    heads: int
    tied_heads: int
    removed_units: int
    removed_heads: int
    attention_parameters: int
    tied_parameters: int
    removed_unit_parameters: int
    span_parameters: int
    pooled_parameters: int
    base_parameters: int
    base_cache: int
    stored_cache: int
    basis_parameters: int = 0
    dropped_layers: int = 0
    dropped_norm_parameters: int = 0
    stock_units: int | None = None

    @property
    def effective_ratio(self) -> float:
        """Share of the heads that really change: they are tied, or removed."""
        return (self.tied_units + self.removed_units) / self.units

    @property
    def absent_parameters(self) -> int:
        """Stored in neither form: of followers, and of pooled KV heads."""
        return self.span_parameters + self.pooled_parameters

    @property
    def removed_parameters(self) -> int:
        """No longer stored in the compact form, for whatever reason."""
        units = self.tied_parameters + self.removed_unit_parameters + self.dropped_norm_parameters
        return units + self.absent_parameters + self.basis_parameters

    @property
    def stored_ratio(self) -> float:
        """Share of the attention parameters that are no longer stored; norms are none of them."""
        attention = self.removed_parameters - self.dropped_norm_parameters
        return attention / self.attention_parameters

    @property
    def stored_parameters(self) -> int:
        """Stored in the compact form."""
        return self.base_parameters - self.removed_parameters

    @property
    def expanded_parameters(self) -> int:
        """Of the Llama with all units of a layer: tied units are written out, removed ones are
        zeros, and dropped layers keep their norm."""
        return self.base_parameters - self.absent_parameters

    @property
    def dense_parameters(self) -> int:
        """Stored in the dense form: as :attr:`expanded_parameters`, without what every layer has
        lost as much of."""
        uniform = self.stock_units is not None
        return self.expanded_parameters - self.removed_unit_parameters * uniform

    @property
    def cache_ratio(self) -> float:
        """Share of the KV cache that is no longer needed."""
        return 1 - self.stored_cache / self.base_cache

    def bytes(self, element_size: int) -> tuple[int, int]:
        """Bytes of the parameters (base, stored) at ``element_size`` bytes an element."""
        return self.base_parameters * element_size, self.stored_parameters * element_size


def llama_parameters(config: Any) -> int:
    """Number of parameters of a dense Llama of this config, tied embeddings counted once."""
    layout = HeadLayout.from_config(config)
    hidden, middle, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    mlp = 3 * hidden * middle
    if getattr(config, "mlp_bias", False):
        mlp += 2 * middle + hidden
    embeddings = vocab * hidden * (1 if config.tie_word_embeddings else 2)
    norms = (2 * layout.layers + 1) * hidden
    return embeddings + norms + layout.layers * mlp + layout.attention_parameters


__all__ = ["PlanSavings", "llama_parameters"]
