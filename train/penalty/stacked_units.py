"""Units of whole parameters, many at a time: stacked by one operation, and added to by one.

On a GPU each operation on the list of units (`torch.stack`, `torch._foreach_*`) is a few launches
for all of them. Views launch nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_models.heads import HeadLayout


def units_of(weights: Sequence[Tensor], layout: HeadLayout, projection: str) -> list[Tensor]:
    """Views of all units, layer after layer; in the shape that :func:`stacked_shape` gives."""
    width, axis = layout.width(projection), layout.axis(projection)
    return [unit for weight in weights for unit in weight.split(width, axis)]


def stacked_shape(layout: HeadLayout, projection: str) -> tuple[int, int]:
    """(width, hidden) of q, k and v, (hidden, width) of o: a unit as it lies in its weight."""
    width = layout.width(projection)
    return (layout.hidden_size, width) if layout.axis(projection) else (width, layout.hidden_size)


def norms(stacked: Tensor) -> Tensor:
    """Length of each unit of [units, rows, columns], fp32."""
    return torch.linalg.vector_norm(stacked, dim=(1, 2))


def add_rows(into: Tensor, index: Tensor, rows: Tensor, sign: int) -> None:
    """`into[index] += sign * rows`, repeated indices added up in a fixed order on every device.

    With DDP the ranks must get the same bits, and index_add_ on a GPU adds in any order.
    """
    if into.device.type == "cpu":
        into.index_add_(0, index, rows, alpha=sign)
    else:
        into.index_put_((index,), rows if sign == 1 else -rows, accumulate=True)


def add_units(
    weights: Sequence[Tensor],
    layout: HeadLayout,
    projection: str,
    places: Sequence[int],
    parts: Tensor,
    elements: int,
) -> None:
    """Add to distinct units.

    Args:
        weights: of some layers, contiguous; changed in place.
        places: of the units in what :func:`units_of` gives.
        parts: [units, rows, columns], for each place.
        elements: most elements that may be held beside them.
    """
    parts = parts.to(weights[0].device)
    if layout.axis(projection) and parts.device.type != "cpu":
        add_columns(weights, layout, projection, places, parts, elements)
        return
    views = units_of(weights, layout, projection)
    torch._foreach_add_([views[place] for place in places], list(parts.unbind(0)))


def add_columns(
    weights: Sequence[Tensor],
    layout: HeadLayout,
    projection: str,
    places: Sequence[int],
    parts: Tensor,
    elements: int,
) -> None:
    """:func:`add_units` by whole weights.

    A GPU has one launch for many tensors only where each is contiguous, and columns are not.
    """
    layers = max(1, elements // (2 * weights[0].numel()))
    for first in range(0, len(weights), layers):
        some = weights[first : first + layers]
        low, high = first * layout.units, (first + len(some)) * layout.units
        rows = [row for row, place in enumerate(places) if low <= place < high]
        if not rows:
            continue
        index = torch.tensor([places[row] - low for row in rows], device=parts.device)
        taken = parts if len(rows) == len(places) else parts[torch.tensor(rows).to(parts.device)]
        whole = parts.new_zeros(high - low, *stacked_shape(layout, projection))
        whole.index_copy_(0, index, taken)
        by_layer = whole.unflatten(0, (-1, layout.units)).transpose(1, 2).flatten(2)
        torch._foreach_add_(list(some), list(by_layer.unbind(0)))
