"""The compact model: a Llama in which every shared unit is stored, and held, once."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM

from .configuration import SharedLlamaConfig
from .heads import PROJECTIONS, HeadLayout
from .plan import SharingPlan
from .projections import Piece, SharedLinear, SharedOutputLinear, transpose_storage_


class SharedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama that applies the sharing plan of its config.

    Computes what the materialized dense Llama computes (contract 1). Raises PostshareError when
    the plan does not fit the config.
    """

    config_class = SharedLlamaConfig
    config: SharedLlamaConfig

    def __init__(self, config: SharedLlamaConfig) -> None:
        plan = config.plan
        super().__init__(config)
        share_projections_(self, plan)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; also restores the storage order of o, which a file cannot hold."""
        loaded = super().from_pretrained(*args, **kwargs)
        transpose_storage_(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def from_materialized(
        cls, model: LlamaForCausalLM, plan: SharingPlan
    ) -> SharedLlamaForCausalLM:
        """The compact form of a dense model into which the plan has been materialized.

        Own rows are copied; every other parameter is shared with ``model``.
        """
        plan = plan.effective()
        config = compact_config(model.config, plan)
        with torch.device("meta"):
            compact = cls(config)
        own = own_units(plan, HeadLayout.from_config(config))
        state = dict(model.named_parameters())
        for name, parameter in list(compact.named_parameters()):
            value = state[name]
            layer_and_projection = HeadLayout.parse_name(name)
            if layer_and_projection is not None:
                layer, projection = layer_and_projection
                kept = select_units(value.detach(), own[layer][projection], config, projection)
                value = nn.Parameter(kept.clone(), requires_grad=value.requires_grad)
            _set_parameter(compact, name, value, parameter)
        compact.tie_weights()
        compact.model.rotary_emb = model.model.rotary_emb
        transpose_storage_(compact)
        return compact.train(model.training)


def compact_config(config: object, plan: SharingPlan) -> SharedLlamaConfig:
    """The compact config of a dense LlamaConfig and a plan (its effective part)."""
    values = config.to_dict()  # type: ignore[attr-defined]
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    values["architectures"] = ["SharedLlamaForCausalLM"]
    return SharedLlamaConfig(**values, sharing=plan.effective().to_dict())


def own_units(plan: SharingPlan, layout: HeadLayout) -> list[dict[str, list[int]]]:
    """For every layer and projection, the units that the layer stores itself, ascending."""
    source_of = plan.sources()
    return [
        {p: [u for u in range(layout.units) if (layer, u, p) not in source_of] for p in PROJECTIONS}
        for layer in range(layout.layers)
    ]


def select_units(
    weight: torch.Tensor, units: list[int], config: object, projection: str
) -> torch.Tensor:
    """The rows (o: columns) of the given units: what a compact projection stores."""
    layout = HeadLayout.from_config(config)
    width = layout.width(projection)
    index = torch.tensor(units, dtype=torch.long, device=weight.device)
    features = (index[:, None] * width + torch.arange(width, device=weight.device)).flatten()
    return weight.index_select(layout.axis(projection), features)


def share_projections_(model: LlamaForCausalLM, plan: SharingPlan) -> None:
    """Replace q, k, v and o of every layer by projections that keep only their own units."""
    layout = HeadLayout.from_config(model.config)
    own, source_of = own_units(plan, layout), plan.sources()
    projections: dict[tuple[int, str], SharedLinear] = {}
    for layer in range(layout.layers):
        attention = model.model.layers[layer].self_attn
        for p in PROJECTIONS:
            dense = getattr(attention, f"{p}_proj")
            kind = SharedOutputLinear if p == "o" else SharedLinear
            weight = select_units(dense.weight.detach(), own[layer][p], model.config, p)
            shared = kind(dense.in_features, dense.out_features, weight)
            setattr(attention, f"{p}_proj", shared)
            projections[layer, p] = shared
    for (layer, p), shared in projections.items():
        pieces: list[Piece] = []
        for unit in range(layout.units):
            owner_layer, stored = source_of.get((layer, unit, p), (layer, unit))
            width = layout.width(p)
            piece = Piece(
                owner=projections[owner_layer, p],
                start=unit * width,
                stop=(unit + 1) * width,
                first=own[owner_layer][p].index(stored) * width,
            )
            if pieces and pieces[-1].owner is piece.owner and pieces[-1].last == piece.first:
                piece = pieces.pop()._replace(stop=piece.stop)
            pieces.append(piece)
        shared.connect(tuple(pieces))
    transpose_storage_(model)


def _set_parameter(
    model: nn.Module, name: str, value: nn.Parameter, expected: torch.Tensor
) -> None:
    if value.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)} instead of {tuple(expected.shape)}")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


__all__ = ["SharedLlamaForCausalLM"]
