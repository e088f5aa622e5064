"""Magnitudes of units: the pruning controls that look at weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sa_models.heads import PROJECTIONS, HeadLayout, unit_view
from sa_models.ties import Unit
from sa_models.weights.compact_folder import DenseReader


def unit_norms(reader: DenseReader, layout: HeadLayout) -> torch.Tensor:
    """Frobenius norm of the q, k, v and o weights of every unit: float64 (layers, units).

    Layers that lack some of the projections (followers of spans) are nan.
    """
    names = set(reader.names())
    norms = torch.full((layout.layers, layout.units), float("nan"), dtype=torch.float64)
    for layer in range(layout.layers):
        if not all(layout.parameter_name(layer, p) in names for p in PROJECTIONS):
            continue
        total = torch.zeros(layout.units, dtype=torch.float64)
        for p in PROJECTIONS:
            weight = reader.read(layout.parameter_name(layer, p))
            total += unit_view(weight.double(), layout, p).square().sum((1, 2))
        norms[layer] = total.sqrt()
    return norms


def least_important(
    importance: torch.Tensor, units: Sequence[Unit], count: int, keep: int = 1
) -> tuple[Unit, ...]:
    """The units of least importance, of which every layer keeps some.

    Args:
        importance: (layers, units).
        units: that may be chosen.
        count: of units to choose.
        keep: units that stay in every layer.

    Raises:
        ValueError: there are fewer.
    """
    room = [importance.shape[1] - keep] * len(importance)
    chosen: list[Unit] = []
    for unit in sorted(units, key=lambda u: (float(importance[u]), u)):
        if len(chosen) < count and room[unit[0]]:
            room[unit[0]] -= 1
            chosen.append(unit)
    if len(chosen) < count:
        raise ValueError(f"{count} units are asked for, {len(chosen)} may be chosen")
    return tuple(sorted(chosen))
