"""The projections of a compact model: own rows, tied rows as views, factors that layers share.

A projection keeps only its *own* rows (for o: columns), in the order of its units. Tied units are
read from the projection that owns them, as views: no weight is gathered or copied in a forward
pass, and autograd adds the gradients of all readers into the one parameter. For inference weights
are packed (:mod:`sa_models.packing`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .errors import PostshareError
from .packing import PackedWeight, Packing, SourceLinear

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Piece(NamedTuple):
    """Consecutive features of a projection, and where their weights are stored.

    ``start:stop`` are features of this projection (outputs of q, k, v; inputs of o), ``first`` is
    the row (o: column) of ``owner.weight`` at which they begin. Tied features may be those of other
    units of the same layer: the owner is this projection then too.
    """

    owner: SharedLinear
    start: int
    stop: int
    first: int
    tied: bool

    @property
    def last(self) -> int:
        return self.first + self.stop - self.start

    def goes_on_with(self, other: Piece) -> bool:
        """Whether the two are one piece; ``other`` begins where this one stops."""
        return (other.owner, other.first, other.tied) == (self.owner, self.last, self.tied)


class SharedLinear(Packing, SourceLinear):
    """A q, k or v projection: own rows in one GEMM, tied rows from views of their owners.

    ``weight`` has shape (own rows, in_features); ``out_features`` are those of all units of the
    layer, own and tied.
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
        if (weight := self.whole(x)) is not None:
            return functional.linear(x, weight)
        rows, product = _rows_and_product(x, self.is_quantized)
        own = product(self.stored, rows)
        parts = list(own.split_with_sizes(self.own_widths, -1)) if self.own_widths else []
        for at, owner, first, width in self.tied:
            parts.insert(at, product(owner.part(first, width, rows.device), rows))
        if not self.own_widths:
            parts.append(own)  # an empty weight too gets a gradient, which DDP waits for
        return torch.cat(parts, -1).view(*x.shape[:-1], self.out_features)

    def whole(self, x: torch.Tensor) -> torch.Tensor | None:
        """The weight of all features in one tensor, to multiply x with; None where there is none.

        Of a projection that owns all its features it is the parameter, else the packed weight.
        """
        return self.stored if self.owns_all else self.packed_on(x.device)

    def _pack(self) -> torch.Tensor:
        parts = [p.owner.stored.narrow(self.axis, p.first, p.stop - p.start) for p in self.pieces]
        return torch.cat(parts, self.axis)

    def part(self, first: int, width: int, device: torch.device) -> torch.Tensor:
        """So many rows (o: columns) of the weight from ``first`` on, for a reader on a device.

        A view where the weight is there; else a copy of it. Where ``device_map`` has offloaded the
        weight, the hook that loads it for this projection's own forward pass loads it.

        Raises:
            PostshareError: the weight is offloaded in a way that leaves it out here.
        """
        weight = self.stored
        if weight.device == device:
            return weight.narrow(self.axis, first, width)
        hook = getattr(self, "_hf_hook", None) if weight.is_meta else None
        if hook is None:
            return self._moved(first, width, device)
        hook.pre_forward(self)
        try:
            return self._moved(first, width, device)
        finally:
            hook.post_forward(self, None)

    def _moved(self, first: int, width: int, device: torch.device) -> torch.Tensor:
        if self.stored.is_meta:
            raise PostshareError(
                "a weight that several units share is offloaded where they cannot read it; load "
                "the model with device_map alone, or without offloading"
            )
        return self.stored.narrow(self.axis, first, width).to(device)

    def connect(self, pieces: tuple[Piece, ...]) -> None:
        """Say where the features are stored, in their order.

        Raises:
            ValueError: own features that are not stored in their order, one after the other.
        """
        self.pieces = pieces
        # What the forward pass reads: the time it spends around the products counts in decoding.
        self.widths = [piece.stop - piece.start for piece in pieces]
        self.own_at = [at for at, piece in enumerate(pieces) if not piece.tied]
        self.own_widths = [self.widths[at] for at in self.own_at]
        self.tied = [
            (at, piece.owner, piece.first, self.widths[at])
            for at, piece in enumerate(pieces)
            if piece.tied
        ]
        firsts = [pieces[at].first for at in self.own_at]
        if firsts != [sum(self.own_widths[:i]) for i in range(len(firsts))]:
            raise ValueError(f"own features begin at {firsts}, which is not their order")
        self.owns_all = len(pieces) == 1 and not pieces[0].tied
        owners = {id(piece.owner): piece.owner for piece in pieces}
        self._packed = PackedWeight([*owners.values()], self._pack)

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are torchao's: sliced like others, but known to ``linear`` alone."""
        read = self if self.own_widths or not self.tied else self.tied[0][1]
        return hasattr(read.stored, "qdata")

    def extra_repr(self) -> str:
        # Not from the weight, whose shape is gone where it is split over ranks.
        return f"{super().extra_repr()}, own={sum(self.own_widths)}"


class SharedOutputLinear(SharedLinear):
    """The o projection: own columns in one GEMM, tied columns added from views of their owners.

    ``weight`` has the shape (out_features, own columns) that every tool expects of a Linear, and
    the storage of its transpose, which keeps the columns of a unit contiguous (a tied unit is then
    as fast to read as an own one). See :func:`transpose_storage_`.
    """

    axis = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        if (weight := self.whole(x)) is not None:
            return functional.linear(x, weight)
        quantized = self.is_quantized
        rows, product = _rows_and_product(x, quantized)
        parts = rows.split_with_sizes(self.widths, -1)
        own = [parts[at] for at in self.own_at]
        y = product(self.stored, torch.cat(own, -1) if own else rows[..., :0])
        # Neither autocast nor quantized weights know in-place products.
        adds = y.dtype == self.stored.dtype and not quantized
        for at, owner, first, width in self.tied:
            columns = owner.part(first, width, rows.device)
            if not adds:
                y = y + product(columns, parts[at])
            elif y.dim() == 1:
                y.addmv_(columns, parts[at])  # adds inside the product: no pass over y
            else:
                y.addmm_(parts[at], columns.t())
        return y.view(*x.shape[:-1], self.out_features)


class SharedBasisLinear(Packing):
    """A q, k or v projection of a plan with a basis (Basis Sharing): x -> C (B x).

    ``coefficients`` (C) are its own. ``basis`` (B) is that of the first layer of its group, whose
    projection alone has the module: the others look it up at every call.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, owns_basis: bool) -> None:
        super().__init__()
        if owns_basis:  # first, as ever: parameters have an order
            self.basis = SourceLinear(in_features, rank, bias=False)
        self.coefficients = SourceLinear(rank, out_features, bias=False)
        if owns_basis:
            self.connect(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        # Adapters are no plain factors.
        plain = type(self.coefficients) is type(self.owner.basis) is SourceLinear
        if plain and (weight := self.packed_on(x.device)) is not None:
            return functional.linear(x, weight)
        return self.coefficients(self.owner.basis(x))

    def _pack(self) -> torch.Tensor:
        """C B, of weights in 16 bits rounded once, as the dense export has it."""
        basis, coefficients = self.owner.basis.stored, self.coefficients.stored
        wide = torch.promote_types(basis.dtype, torch.float32)
        return (coefficients.to(wide) @ basis.to(wide)).to(basis.dtype)

    def connect(self, owner: SharedBasisLinear) -> None:
        """Say which projection has the basis."""
        self._owner = (owner,)  # a tuple is not registered by nn.Module
        self._packed = PackedWeight([owner.basis, self.coefficients], self._pack)

    @property
    def owner(self) -> SharedBasisLinear:
        return self._owner[0]


def _rows_and_product(x: torch.Tensor, quantized: bool) -> tuple[torch.Tensor, Product]:
    """The rows of x in the shape that is multiplied fastest, and what multiplies (weight, rows).

    The one row of a decoded token is a vector: with a handful of small products for each
    projection, what is spent around them counts. (In bf16 a CPU has no fast vector product.)
    """
    if x.numel() == x.shape[-1] and x.dtype == torch.float32 and not quantized:
        return x.flatten(), torch.matmul
    return x.reshape(-1, x.shape[-1]), _linear


def _linear(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return functional.linear(rows, weight)


def transpose_storage_(model: nn.Module) -> None:
    """Store the weights of o transposed (same shape, other strides), where they are not yet.

    Quantized ones are left: their rows have the scales.
    """
    for module in model.modules():
        if not isinstance(module, SharedOutputLinear) or hasattr(module.weight, "qdata"):
            continue
        if not module.weight.t().is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()
