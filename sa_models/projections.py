"""The projections of a compact model: own rows in one GEMM, tied rows from views of their owners.

A projection keeps only its *own* rows (for o: columns), in the order of its units. Tied units are
read from the projection that owns them, as views: no weight is gathered or copied in a forward
pass, and autograd adds the gradients of all readers into the one parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


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


def transpose_storage_(model: nn.Module) -> None:
    """Store the weights of o transposed (same shape, other strides), where they are not yet."""
    for module in model.modules():
        if isinstance(module, SharedOutputLinear) and not module.weight.t().is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()
