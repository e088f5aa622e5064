"""The compact model: a Llama in which every shared unit is stored, and held, once.

A projection keeps only its *own* rows (for o: columns), in the order of its units. Tied units are
read from the projection that owns them, as views: no weight is gathered or copied in a forward
pass, and autograd adds the gradients of all readers into the one parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from .configuration import SharedLlamaConfig
from .heads import PROJECTIONS, HeadLayout
from .plan import SharingPlan


class Piece(NamedTuple):
    """Consecutive features of a projection, and where their weights are stored.

    ``start:stop`` are features of this projection (outputs of q, k, v; inputs of o), ``first`` is
    the row (o: column) of ``owner.weight`` at which they begin.
    """

    owner: SharedLinear
    start: int
    stop: int
    first: int

    @property
    def last(self) -> int:
        return self.first + self.stop - self.start


class SharedLinear(nn.Linear):
    """A q, k or v projection: own rows in one GEMM, tied rows from views of their owners.

    ``weight`` has shape (own rows, in_features); ``out_features`` is that of the dense projection.
    """

    axis = 0

    def __init__(self, in_features: int, out_features: int, weight: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None)
        # A tuple is not registered by nn.Module: owners stay modules of their own layers only,
        # and are looked up at every call, so that replaced parameters are seen.
        self.connect(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        own = functional.linear(x, self.weight)
        if self.owns_all:
            return own
        # split and narrow instead of slices: when a token is decoded, their overhead counts.
        runs = iter(own.split(self.own_runs, dim=-1) if self.own_runs else ())
        parts = [
            next(runs)
            if owner is self
            else functional.linear(x, owner.weight.narrow(0, first, stop - start))
            for owner, start, stop, first in self.pieces
        ]
        if own.shape[-1] == 0:
            parts.append(own)  # an empty weight too gets a gradient, which DDP waits for
        return torch.cat(parts, dim=-1)

    def connect(self, pieces: tuple[Piece, ...]) -> None:
        """Say where the features are stored, in their order.

        Raises:
            ValueError: own features that are not stored in their order, one after the other.
        """
        self.pieces = pieces
        self.own_runs = [stop - start for owner, start, stop, _ in pieces if owner is self]
        firsts = [first for owner, _, _, first in pieces if owner is self]
        if firsts != [sum(self.own_runs[:i]) for i in range(len(firsts))]:
            raise ValueError(f"own features begin at {firsts}, which is not their order")
        self.owns_all = len(pieces) == 1 and pieces[0].owner is self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, own={self.weight.shape[self.axis]}"


class SharedOutputLinear(SharedLinear):
    """The o projection: own columns in one GEMM, tied columns added from views of their owners.

    ``weight`` has the shape (out_features, own columns) that every tool expects of a Linear, and
    the storage of its transpose, which keeps the columns of a unit contiguous (a tied unit is then
    as fast to read as an own one). See :func:`transpose_storage_`.
    """

    axis = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.owns_all:
            return functional.linear(x, self.weight)
        rows = x.flatten(0, -2)
        own = [rows[:, start:stop] for owner, start, stop, _ in self.pieces if owner is self]
        y = functional.linear(torch.cat(own, dim=-1) if own else rows[:, :0], self.weight)
        for owner, start, stop, first in self.pieces:
            if owner is self:
                continue
            part = rows.narrow(1, start, stop - start)
            columns = owner.weight.narrow(1, first, stop - start)
            if y.dtype == columns.dtype:
                y.addmm_(part, columns.t())  # adds inside the product: no pass over y
            else:  # autocast, which knows no in-place products
                y = y + functional.linear(part, columns)
        return y.unflatten(0, x.shape[:-1])


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


def transpose_storage_(model: nn.Module) -> None:
    """Store the weights of o transposed (same shape, other strides), where they are not yet."""
    for module in model.modules():
        if isinstance(module, SharedOutputLinear) and not module.weight.t().is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()


def _set_parameter(
    model: nn.Module, name: str, value: nn.Parameter, expected: torch.Tensor
) -> None:
    if value.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)} instead of {tuple(expected.shape)}")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


__all__ = ["SharedLlamaForCausalLM"]
