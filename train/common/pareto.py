"""Pareto fronts: what is better than all that is smaller."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def pareto(points: NDArray[np.float64]) -> list[int]:
    """Indices of the points (bytes, perplexity) that no other point beats in both, by bytes."""
    order = np.lexsort((points[:, 1], points[:, 0]))
    front, best = [], math.inf
    for index in order:
        if points[index, 1] < best:
            front.append(int(index))
            best = points[index, 1]
    return front
