"""The stock form of a plan that takes as many units from every layer: a Llama with fewer heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from sa_models.heads import HeadLayout
from sa_models.modeling import select_units
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import DROPPED, DenseReader
from sa_models.weights.uneven_heads import config_class


class FewerHeadsReader:
    """Dense weights without the units that a plan removes, read tensor by tensor.

    Args:
        source: dense weights with all units of a layer, materialized.
        plan: uniform, see :meth:`SharingPlan.stock_units`.

    Attributes:
        config: the stock ``LlamaConfig`` with fewer heads and an explicit ``head_dim``.
    """

    def __init__(self, source: DenseReader, plan: SharingPlan) -> None:
        self.path, self._source = source.path, source
        units = plan.stock_units(source.config)
        assert units is not None
        layout = plan.layout(source.config)
        self._kept = plan.kept_units(layout)
        self._layout = layout.with_units(units)
        self.config = fewer_heads_config(source.config, self._layout)

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        where = HeadLayout.parse_name(name)
        return self._source.shape(name) if where is None else self._layout.shape(where[1])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def shards(self) -> list[Path]:
        return self._source.shards()

    def read(self, name: str) -> torch.Tensor:
        """The rows (o: columns) of the units that are left, in the dtype of the source."""
        where, tensor = HeadLayout.parse_name(name), self._source.read(name)
        if where is None:
            return tensor
        layer, p = where
        return select_units(tensor, self._kept[layer], self._source.config, p)

    def slice(self, name: str) -> Any:
        return self.read(name)


def stock_form(source: DenseReader, plan: SharingPlan) -> DenseReader:
    """What a stock Llama stores of materialized dense weights: all, unless the plan is uniform."""
    uniform = plan.stock_units(source.config) is not None
    return FewerHeadsReader(source, plan) if uniform else source


def fewer_heads_config(config: LlamaConfig, layout: HeadLayout) -> LlamaConfig:
    """The stock config of a model with these heads in every layer."""
    values = {key: value for key, value in config.to_dict().items() if key not in DROPPED}
    values |= {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
    }
    return config_class(values)(**values)
