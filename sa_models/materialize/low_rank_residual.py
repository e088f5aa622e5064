"""Low-rank residuals: as much of what ties lose as fits into a few numbers.

A projection W of which units are tied computes with W' instead. What it lost is R = W - W' (zero in
the rows, for o the columns, of units that kept their weights); a residual of rank r adds B A to W',
with B (out, r) and A (r, in). With the second moments C of the inputs x, the B A that minimises the
mean of ||(R - B A) x||^2, which is ||(R - B A) C^(1/2)||_F^2, projects R on the r main directions
of the lost outputs:

    B A = U U^T R,    U: eigenvectors of R C R^T with the r largest eigenvalues.

This is SVD-LLM's whitened truncation (2403.07378: U S V^T C^(-1/2), with U S V^T that of
R C^(1/2)), written without the inverse, so that a singular C needs no ridge. The error is the sum
of the other eigenvalues. With C = I it is the truncated SVD of R.

One residual covers all tied units of a projection: R has their rows below one another. Blocks of
rank r/n for n units are one such B A, so that they are never better at the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from sa_models.calibration.input_moments import Where
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import DenseReader

NOTHING = 1e-12
"""A direction whose lost output is this small a part of the largest one's counts as not lost."""


class Pair(NamedTuple):
    """A residual B A: ``a`` (rank, in_features) and ``b`` (out_features, rank), features of the
    compact projection, where removed units have none."""

    a: torch.Tensor
    b: torch.Tensor

    def product(self) -> torch.Tensor:
        """B A in fp32."""
        return self.b.float() @ self.a.float()

    @property
    def parameters(self) -> int:
        return self.a.numel() + self.b.numel()


def pairs_hash(pairs: Mapping[Where, Pair]) -> str:
    """SHA-256 (hex) of residuals: their places, shapes and fp32 values."""
    digest = hashlib.sha256()
    for where, pair in sorted(pairs.items()):
        for value in pair:
            digest.update(f"{where} {tuple(value.shape)}".encode())
            digest.update(value.float().contiguous().numpy().data)
    return digest.hexdigest()


def lost(
    before: DenseReader, after: DenseReader, plan: SharingPlan, layer: int, projection: str
) -> torch.Tensor:
    """R of one projection, float64 (out_features, in_features) of the units that are not removed.

    Args:
        before, after: dense weights without and with the plan's ties.
    """
    layout = plan.layout(before.config)
    name = layout.parameter_name(layer, projection)
    difference = before.read(name).double() - after.read(name).double()
    index = kept_features(plan, layout, layer, projection)
    return difference.index_select(layout.axis(projection), index)


def kept_features(
    plan: SharingPlan, layout: HeadLayout, layer: int, projection: str
) -> torch.Tensor:
    """Rows (o: columns) of the dense projection that the compact one has too, int64."""
    width = layout.width(projection)
    units = torch.tensor(plan.kept_units(layout)[layer])
    return (units[:, None] * width + torch.arange(width)).flatten()


def low_rank(
    lost: torch.Tensor, rank: int, moments: torch.Tensor | None, generator: torch.Generator
) -> Pair:
    """The best residual of a rank, fp32; see the module.

    A direction in which nothing was lost begins as PEFT's LoRA does (B zero, A uniform), so that it
    adds nothing and can be trained. The two factors of every other direction have one norm.

    Args:
        lost: R, float64 (out_features, in_features).
        moments: C, (in_features, in_features), times any constant; None: that of white inputs.
        generator: for the A of directions in which nothing was lost.
    """
    out, features = lost.shape
    bound = 1 / math.sqrt(features)
    a = torch.empty(rank, features, dtype=torch.float64).uniform_(
        -bound, bound, generator=generator
    )
    b = torch.zeros(out, rank, dtype=torch.float64)
    rows = lost.any(1).nonzero().flatten()  # the others are kept: their directions are axes
    if not len(rows):
        return Pair(a.float(), b.float())
    part = lost[rows]
    weighted = part if moments is None else part @ moments.to(part)
    values, vectors = torch.linalg.eigh(weighted @ part.T)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    found = int((values > NOTHING * values[0]).sum())
    directions = vectors[:, :found]
    # Either sign is an eigenvector: the one whose largest component is positive.
    directions = directions * directions.gather(0, directions.abs().argmax(0)[None]).sign()
    projected = directions.T @ part
    scale = projected.norm(dim=1).sqrt()
    a[:found] = projected / scale[:, None]
    b[rows, :found] = directions * scale
    return Pair(a.float(), b.float())


def share_left(lost: torch.Tensor, pair: Pair, moments: torch.Tensor | None) -> float:
    """What is left of the squared lost output with the residual: 0 (all is back) to 1."""
    rest = lost - pair.b.double() @ pair.a.double()

    def size(matrix: torch.Tensor) -> float:
        weighted = matrix if moments is None else matrix @ moments.to(matrix)
        return float((weighted * matrix).sum())

    whole = size(lost)
    return size(rest) / whole if whole else 0.0
