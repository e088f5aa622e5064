"""A plan without spans as a Llama of stock layers, each with the heads that it has left.

Inference engines know one weight for each projection, and fuse, shard and compile the layers that
they know. So weights are packed here when they are loaded (ties copied, factors multiplied), and
every layer is transformers' own ``LlamaDecoderLayer``, of the model's config with its own number of
heads. Transformers 5.16 to 5.24 have such configs (``per_layer_config``) but no Llama that reads
them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sa_models.basis import FACTORED, basis_name, coefficients_name
from sa_models.configuration import SharedLlamaConfig
from sa_models.heads import PROJECTIONS, HeadLayout, unit_view

Weight = tuple[str, torch.Tensor]
"""A parameter's name in a checkpoint, and its value."""


@strict
class PackedLlamaConfig(SharedLlamaConfig):
    """The config of a compact model, read as that of a :class:`PackedLlamaModel`."""

    model_type = "packed_llama"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan  # its projections are whole
    base_model_pp_plan = LlamaConfig.base_model_pp_plan


class PackedLlamaModel(LlamaModel):
    """A LlamaModel whose layers have the heads that the plan leaves them."""

    config_class = PackedLlamaConfig
    config: PackedLlamaConfig

    def __init__(self, config: PackedLlamaConfig) -> None:
        super().__init__(config)
        for at, own in enumerate(layer_configs(config)):
            layer = LlamaDecoderLayer(own, at)
            # The attention implementation may be changed later, and is that of the model.
            layer.self_attn.config = config
            self.layers[at] = layer
        self.post_init()


def packed_config(config: SharedLlamaConfig) -> PackedLlamaConfig:
    """The same values, with the attention implementation that is set."""
    values = config.to_dict()
    for key in ("model_type", "auto_map", "transformers_version"):
        values.pop(key, None)
    packed = PackedLlamaConfig(**values)
    packed._attn_implementation = config._attn_implementation
    return packed


def is_packable(config: SharedLlamaConfig) -> bool:
    """Whether the plan is one of layers that each compute an attention of their own."""
    plan = config.plan
    return not plan.spans and not plan.dropped(plan.layout(config))


def layer_configs(config: SharedLlamaConfig) -> list[LlamaConfig]:
    """For every layer, the config with the heads that it has left.

    Args:
        config: of a plan that :func:`is_packable`.
    """
    plan = config.plan
    layout = plan.layout(config)
    found: list[LlamaConfig] = []
    for kept in plan.kept_units(layout):
        own, held = copy.copy(config), layout.with_units(len(kept))
        own.num_attention_heads, own.num_key_value_heads = held.heads, held.kv_heads
        own.head_dim, own.sharing = held.head_dim, None  # a plan is one of the whole model
        found.append(own)
    return found


def packed_weights(weights: Iterable[Weight], config: SharedLlamaConfig) -> Iterator[Weight]:
    """The weights of a compact folder as a :class:`PackedLlamaModel` has them.

    Those of attention come last, where units are tied or factors are multiplied, and are held until
    then. Products of factors in 16 bits come in fp32: whoever loads them rounds them to the dtype
    that it serves.

    Args:
        weights: as they are stored, in any order.
        config: of a plan that :func:`is_packable`.
    """
    plan = config.plan
    if not plan.ties and plan.basis is None:
        yield from weights
        return
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if ".self_attn." in name:
            stored[name] = tensor
        else:
            yield name, tensor
    layout = plan.layout(config)
    own, source_of = plan.own_units(layout), plan.sources()
    for layer, kept in enumerate(plan.kept_units(layout)):
        for p in PROJECTIONS:
            name = layout.parameter_name(layer, p)
            if plan.basis is not None and p in FACTORED:
                first, _ = plan.basis.place(layer, p)
                factors = stored[coefficients_name(layer, p)], stored[basis_name(first, p)]
                yield name, _product(*factors)
                continue
            where = [source_of.get((layer, unit, p), (layer, unit)) for unit in kept]
            rows = torch.cat([_unit(stored, layout, own, p, *place) for place in where])
            yield name, rows.t() if p == "o" else rows


def _unit(
    stored: dict[str, torch.Tensor],
    layout: HeadLayout,
    own: list[dict[str, list[int]]],
    projection: str,
    layer: int,
    unit: int,
) -> torch.Tensor:
    """The rows (o: columns, transposed) of a unit that a layer stores."""
    views = unit_view(stored[layout.parameter_name(layer, projection)], layout, projection)
    return views[own[layer][projection].index(unit)]


def _product(coefficients: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(basis.dtype, torch.float32)
    return (coefficients.double() @ basis.double()).to(wide)


def unsplittable(config: SharedLlamaConfig, devices: int) -> LlamaConfig | None:
    """The first layer whose heads, or KV heads, do not divide among so many devices.

    One KV head may be held by several of them.

    Args:
        config: of a plan that :func:`is_packable`.
    """
    for layer in layer_configs(config):
        heads = layer.num_attention_heads
        kv_heads = layer.num_key_value_heads or heads
        if heads % devices or (kv_heads % devices and devices % kv_heads):
            return layer
    return None


__all__ = [
    "PackedLlamaConfig",
    "PackedLlamaModel",
    "is_packable",
    "layer_configs",
    "packed_config",
    "packed_weights",
    "unsplittable",
]
