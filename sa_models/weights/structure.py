"""The structure of a plan, given to a pretrained Llama: fewer KV heads, and spans.

* KV heads are mean-pooled, group by group (GQA, 2305.13245).
* The projections that a follower does not have are dropped, by name.
* The leader of a ``kv`` span gets the mean of the keys and values of all layers it serves (as MLKV
  and LCKV do), or keeps its own.

Means are taken in fp32, in the order of heads and layers, and rounded once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.modeling import (
    SharedLlamaForCausalLM,
    compact_config,
    set_parameter,
    without_weights,
)
from sa_models.plan import SharingPlan
from sa_models.projections import transpose_storage_
from sa_models.weights.compact_folder import DenseReader, ExpandedFolder, dense_config

Leaders = Literal["mean", "copy"]
"""Keys and values of a ``kv`` span's leader: the mean over the layers it serves, or its own."""


class ConvertedReader:
    """Dense weights with the structure of a plan, read tensor by tensor.

    Attributes:
        config: the dense ``LlamaConfig`` with the plan's KV heads.

    Raises:
        PostshareError: the plan does not fit the source's config.
    """

    def __init__(self, source: DenseReader, plan: SharingPlan, leaders: Leaders = "mean") -> None:
        plan.validate(source.config)
        self.path = source.path
        self.config = converted_config(source.config, plan)
        self._source = source
        self._heads = plan.layout(self.config).kv_heads
        self._base_heads = HeadLayout.from_config(source.config).kv_heads
        self._head_dim = HeadLayout.from_config(source.config).head_dim
        self._absent = plan.absent()
        self._served = {
            span.leader: span.layers
            for span in plan.spans
            if span.share == "kv" and leaders == "mean"
        }

    def names(self) -> list[str]:
        """The source's names, without the projections that followers do not have."""
        return [n for n in self._source.names() if HeadLayout.parse_name(n) not in self._absent]

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        if self._is_pooled(HeadLayout.parse_name(name)):
            return (self._heads * self._head_dim, *shape[1:])
        return shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def shards(self) -> list[Path]:
        return self._source.shards()

    def read(self, name: str) -> torch.Tensor:
        """The converted tensor, in the dtype of the source."""
        where = HeadLayout.parse_name(name)
        served = self._served.get(where[0]) if where is not None and where[1] in "kv" else None
        if where is None or not (served or self._is_pooled(where)):
            return self._source.read(name)
        layers = served or (where[0],)
        tensors = [self._source.read(HeadLayout.parameter_name(i, where[1])) for i in layers]
        total = torch.zeros(tensors[0].shape, dtype=torch.float32, device=tensors[0].device)
        for tensor in tensors:
            total += tensor
        # (KV heads, pooled heads, head_dim, hidden)
        heads = total.unflatten(0, (self._heads, -1, self._head_dim))
        return (heads.sum(1) / (heads.shape[1] * len(layers))).flatten(0, 1).to(tensors[0].dtype)

    def slice(self, name: str) -> Any:
        """The tensor, or a lazy slice of it where nothing is converted; index it."""
        where = HeadLayout.parse_name(name)
        if where is not None and (where[0] in self._served or self._is_pooled(where)):
            return self.read(name)
        return self._source.slice(name)

    def _is_pooled(self, where: tuple[int, str] | None) -> bool:
        return where is not None and where[1] in "kv" and self._heads != self._base_heads


def converted(source: DenseReader, plan: SharingPlan, leaders: Leaders = "mean") -> DenseReader:
    """``source`` with the structure of the plan; the source itself where it has it already.

    Raises:
        PostshareError: the plan does not fit the source, or the source is a model with spans of
            another plan.
    """
    pooled = plan.layout(source.config) != HeadLayout.from_config(source.config)
    held = source.plan.spans if isinstance(source, ExpandedFolder | _ModelReader) else ()
    if held:
        if held != plan.spans or pooled:
            raise PostshareError(
                f"{source.path} has other spans or other KV heads than the plan; use the recipe "
                "that trained it, or start from a model without spans"
            )
        plan.validate(source.config)
        return source
    return ConvertedReader(source, plan, leaders) if plan.spans or pooled else source


def converted_config(config: LlamaConfig, plan: SharingPlan) -> LlamaConfig:
    """The dense ``LlamaConfig`` with the plan's KV heads."""
    changed = dense_config(config)
    changed.num_key_value_heads = plan.layout(config).kv_heads
    return changed


def convert(
    model: LlamaForCausalLM, plan: SharingPlan, leaders: Leaders = "mean"
) -> LlamaForCausalLM:
    """A model with the structure of the plan, which is trained and then materialized.

    A :class:`SharedLlamaForCausalLM` where the plan has spans, a stock Llama with fewer KV heads
    where it has none, and ``model`` itself where nothing is to be converted. Parameters that stay
    are shared with ``model``.

    Raises:
        PostshareError: the plan does not fit the model.
    """
    plan = plan.structure()
    source = _ModelReader(model)
    reader = converted(source, plan, leaders)
    if reader is source:
        return model
    if source.plan.ties or source.plan.removed:
        raise PostshareError(
            f"{source.path} holds its tied units once and no removed ones; convert it before its "
            "units are tied and removed"
        )
    new: LlamaForCausalLM
    if plan.spans:
        config = compact_config(reader.config, plan)
        new = without_weights(SharedLlamaForCausalLM, config, model)
    else:
        new = without_weights(LlamaForCausalLM, reader.config, model)
    parameters = dict(model.named_parameters())
    for name, expected in list(new.named_parameters()):
        value = reader.read(name)
        old = parameters[name]
        if value is not old:
            value = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
        set_parameter(new, name, value, expected)
    new.tie_weights()
    transpose_storage_(new)
    return new.train(model.training)


class _ModelReader:
    """A model in memory, read like a folder."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        shared = isinstance(model, SharedLlamaForCausalLM)
        self.plan = model.config.plan if shared else SharingPlan()
        self.path = Path(model.config.name_or_path or "the model")
        self.config = model.config
        self._parameters = dict(model.named_parameters())

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._parameters[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._parameters[name]

    def slice(self, name: str) -> Any:
        return self._parameters[name]

    def shards(self) -> list[Path]:
        return []
