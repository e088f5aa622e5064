"""Long curves made short enough for a picture, without hiding how far they swing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 400
"""Of a curve in the report: more than a screen shows, however long the training was."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Float64 (points,) each; of consecutive rows together.

    Attributes:
        x: the last of the rows.
        mean, low, high: of the rows that have a finite value.
    """

    x: Values
    mean: Values
    low: Values
    high: Values


def shorten(x: Values, y: Values, points: int = POINTS) -> Curve:
    """At most ``points`` points; rows without a finite value are left out first.

    Args:
        x, y: float64 (rows,).
    """
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(y) == 0:
        return Curve(y, y, y, y)
    starts = np.unique(np.arange(min(points, len(y))) * len(y) // min(points, len(y)))
    counts = np.diff(np.append(starts, len(y)))
    return Curve(
        x=x[starts + counts - 1],
        mean=np.add.reduceat(y, starts) / counts,
        low=np.minimum.reduceat(y, starts),
        high=np.maximum.reduceat(y, starts),
    )


def trend(values: Values, share: float = 1 / 12) -> Values:
    """Centred means over a share of the points; at the ends, over those that are there."""
    half = int(len(values) * share) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
