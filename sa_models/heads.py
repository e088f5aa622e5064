"""The layout of heads: a unit's rows and columns in q, k, v and o, under MHA, GQA and MQA.

A unit is what a tie moves as a whole: a KV head with all query heads that read it (under MHA a
single head). Its rows of q, k and v are contiguous, so are its columns of o.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import PostshareError

if TYPE_CHECKING:
    import torch

PROJECTIONS = ("q", "k", "v", "o")
ATTENTION_MODULES = tuple(f"{projection}_proj" for projection in PROJECTIONS)


@dataclass(frozen=True)
class HeadLayout:
    """The attention shape of a Llama."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any) -> HeadLayout:
        """Read it from a LlamaConfig.

        Raises:
            PostshareError: attention biases (no released Llama has them), or a head count that
                does not divide into KV groups.
        """
        if getattr(config, "attention_bias", False):
            raise PostshareError(
                "the model has attention biases, which sharing does not support; "
                "use a Llama with attention_bias: false"
            )
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        if heads % kv_heads:
            raise PostshareError(
                f"{heads} attention heads do not divide into {kv_heads} KV groups; "
                "correct num_key_value_heads in the model's config.json"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, config.hidden_size, heads, kv_heads, head_dim)

    @property
    def units(self) -> int:
        """Units in one layer."""
        return self.kv_heads

    @property
    def heads_per_unit(self) -> int:
        return self.heads // self.kv_heads

    @property
    def unit_name(self) -> str:
        """What a unit is called, in the plural."""
        return unit_name(self.heads, self.units)

    def with_units(self, units: int) -> HeadLayout:
        """The shape with so many units in a layer, each as large as now."""
        return replace(self, heads=units * self.heads_per_unit, kv_heads=units)

    @property
    def stock_class(self) -> str:
        """The class that a stock ``config.json`` names for these heads: see
        :mod:`sa_models.weights.uneven_heads`."""
        return "MistralForCausalLM" if self.hidden_size % self.heads else "LlamaForCausalLM"

    @property
    def tensor_parallel(self) -> list[int]:
        """The numbers of devices among which attention heads and KV heads divide evenly."""
        return [n for n in range(1, self.kv_heads + 1) if self.kv_heads % n == 0]

    def width(self, projection: str) -> int:
        """Rows of q, k, v (columns of o) that belong to one unit."""
        return self.head_dim * (self.heads_per_unit if projection in "qo" else 1)

    def axis(self, projection: str) -> int:
        """The weight's dimension along which units lie: 0 (rows) for q, k, v; 1 for o."""
        return 1 if projection == "o" else 0

    def shape(self, projection: str) -> tuple[int, int]:
        """Shape of the dense weight, (out_features, in_features)."""
        rows = self.units * self.width(projection)
        return (self.hidden_size, rows) if projection == "o" else (rows, self.hidden_size)

    def unit_parameters(self, projection: str) -> int:
        return self.width(projection) * self.hidden_size

    @property
    def attention_parameters(self) -> int:
        """Parameters of q, k, v and o of all layers."""
        return self.layers * self.units * sum(map(self.unit_parameters, PROJECTIONS))

    @staticmethod
    def parameter_name(layer: int, projection: str) -> str:
        return f"model.layers.{layer}.self_attn.{projection}_proj.weight"

    @staticmethod
    def norm_name(layer: int) -> str:
        """The norm that q, k and v read."""
        return f"model.layers.{layer}.input_layernorm.weight"

    @staticmethod
    def parse_name(name: str) -> tuple[int, str] | None:
        """(layer, projection) of a name that :meth:`parameter_name` gives, None for any other."""
        parts = name.split(".")
        if len(parts) == 6 and parts[3] == "self_attn" and parts[4] in ATTENTION_MODULES:
            return int(parts[2]), parts[4][0]
        return None


def unit_name(heads: int, units: int) -> str:
    """What the units of so many heads are called, in the plural."""
    return "heads" if heads == units else "KV groups"


def unit_view(weight: torch.Tensor, layout: HeadLayout, projection: str) -> torch.Tensor:
    """A view of one layer's weight by unit, shape (units, width, hidden_size); writes go through.

    Element [u] holds the rows of unit u (q, k, v), or its columns, transposed (o).
    """
    rows = weight.t() if projection == "o" else weight
    return rows.unflatten(0, (-1, layout.width(projection)))
