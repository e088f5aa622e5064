"""Scores between units that do not change with a head's gauge.

The weights of a head may be changed without changing its function: v and o by any invertible M, q
and k of a RoPE plane by a common angle and by inverse scales. Raw cosines change with them; these
scores do not:

* ``qk_aligned``: the cosine of q and k after the best angle for every plane, in closed form. Plane
  i of a unit is z_i = row_i + j row_(i + d/2) of its query heads and its key, c_i = <z_i, z'_i>;
  the score is sum |c_i| / (norms). One angle per KV group. The scale gauge is normalized away:
  q and k of every plane are brought to equal norms, which is the scale at which their common norm
  is smallest. (It cannot be optimized for a pair: the best scale of one side alone has no bound.)
* ``vo``: the cosine of the maps O V from input to residual stream, summed over the query heads.
* ``qkvo_aligned``: the mean of both.

All pairs come from matrix products over chunks of at most 1 GiB. Projections of a residual row
are made a chunk at a time: no whole (hidden, hidden) map is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sa_models.calibration.progress import Progress
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.plan import Unit
from sa_models.scores import weight_cosine
from sa_models.scores.significance import PairTerms, Terms, over, sum_terms
from sa_models.scores.weight_cosine import Parts, Reader, cosines, gram_matrix, unit_weight


def aligned_scores(
    reader: Reader, layout: HeadLayout, score: str, progress: Progress | None = None
) -> torch.Tensor:
    """Gauge-invariant similarity of every two units of a model.

    Args:
        score: ``qk_aligned``, ``vo`` or ``qkvo_aligned``, defined in this module.

    Returns:
        float64 (layers * units, layers * units), symmetric, ones on the diagonal, zeros for what
        is zero, as :func:`~sa_models.scores.weight_cosine.unit_scores`.
    """
    if score == "qk_aligned":
        return cosines(_aligned_gram(reader, layout, progress))
    if score == "vo":
        return cosines(gram_matrix(_map_chunks(reader, layout), layout, progress))
    # Two bars, one after the other: their units of work are not the same.
    parts = (aligned_scores(reader, layout, part, progress) for part in ("qk_aligned", "vo"))
    return sum(parts, torch.zeros((), dtype=torch.float64)) / 2


def aligned_terms(reader: Reader, layout: HeadLayout, score: str) -> PairTerms:
    """The terms of these scores, for p-values."""

    @lru_cache(maxsize=64)
    def weight(unit: Unit, projection: str) -> torch.Tensor:
        return unit_weight(reader, layout, projection, unit).double()

    def qk(target: Unit, source: Unit) -> Terms:
        a, b = (planes(weight(u, "q"), weight(u, "k"), layout.head_dim) for u in (target, source))
        products = (a * b.conj()).unflatten(1, (-1, layout.hidden_size)).sum(1)
        return sum_terms(over(products, a.norm() * b.norm()))

    def vo(target: Unit, source: Unit) -> Terms:
        def product(one: Unit, two: Unit) -> torch.Tensor:
            # Column x of V1 and V2 with O1^T O2 between, the heads of a group added: never (D, D).
            o1, o2 = (weight(u, "o").unflatten(0, (-1, layout.head_dim)) for u in (one, two))
            between = (o1 @ o2.mT).sum(0)
            return (weight(one, "v") * (between @ weight(two, "v"))).sum(0)

        norms = product(target, target).sum() * product(source, source).sum()
        return sum_terms(values=over(product(target, source), norms.clamp(min=0).sqrt()))

    def both(target: Unit, source: Unit) -> Terms:
        return Terms(qk(target, source).planes / 2, vo(target, source).values / 2)

    return {"qk_aligned": qk, "vo": vo, "qkvo_aligned": both}[score]


# --- q and k --------------------------------------------------------------------------------------


def planes(q: torch.Tensor, k: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The RoPE planes of units, at equal norms of q and k in each.

    Args:
        q, k: (..., rows, columns) of units, in the layout of Hugging Face: rows i and
            i + head_dim/2 of every head are plane i.

    Returns:
        complex (..., head_dim/2, (heads_per_unit + 1) * columns): query heads, then the key. A
        plane of which q or k is zero is zero: it does nothing.
    """
    parts = []
    for rows in (q, k):
        pairs = rows.unflatten(-2, (-1, 2, head_dim // 2))
        z = torch.complex(pairs[..., 0, :, :], pairs[..., 1, :, :])
        parts.append(z.transpose(-3, -2).flatten(-2))  # (..., planes, heads * columns)
    norms = [torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in parts]
    alive = (norms[0] > 0) & (norms[1] > 0)
    ratio = torch.where(alive, norms[1] / norms[0], 0).sqrt()
    inverse = torch.where(alive, norms[0] / norms[1], 0).sqrt()
    return torch.cat([parts[0] * ratio, parts[1] * inverse], dim=-1)


def _aligned_gram(reader: Reader, layout: HeadLayout, progress: Progress | None) -> torch.Tensor:
    """sum over planes of |<z_i, z'_i>| for all pairs, float64."""
    total, half = layout.layers * layout.units, layout.head_dim // 2
    features = (layout.heads_per_unit + 1) * layout.hidden_size
    step = max(1, min(half, weight_cosine.CHUNK_BYTES // (8 * total * features)))
    sums = torch.zeros(total, total, dtype=torch.float64)
    for start in range(0, half, step):
        stop = min(start + step, half)
        z = torch.empty(stop - start, layout.layers, layout.units, features, dtype=torch.complex64)
        for layer in range(layout.layers):
            q, k = (_plane_rows(reader, layout, layer, p, start, stop) for p in "qk")
            z[:, layer] = planes(q, k, 2 * (stop - start)).transpose(0, 1)
        for done, plane in enumerate(z.flatten(1, 2), start=start + 1):
            for first in range(0, total, weight_cosine.BLOCK_UNITS):
                last = min(first + weight_cosine.BLOCK_UNITS, total)
                sums[first:last, :last] += (plane[first:last] @ plane[:last].mH).abs()
            if progress is not None:
                progress(done, half)
    return sums.tril() + sums.tril(-1).T


def _plane_rows(
    reader: Reader, layout: HeadLayout, layer: int, projection: str, start: int, stop: int
) -> torch.Tensor:
    """The rows of some planes, fp32 (units, heads * 2 * planes, hidden)."""
    weight = reader.slice(layout.parameter_name(layer, projection))[:, :]
    rows = weight.unflatten(0, (layout.units, -1, 2, layout.head_dim // 2))
    return rows[:, :, :, start:stop].float().flatten(1, 3)


# --- v and o --------------------------------------------------------------------------------------


def _map_chunks(reader: Reader, layout: HeadLayout) -> Parts:
    """Rows of the maps O V of all query heads of every unit, a range of residual rows at a time."""
    hidden, heads = layout.hidden_size, layout.heads_per_unit
    row = 4 * layout.layers * layout.units * heads * hidden
    step = max(1, min(hidden, weight_cosine.CHUNK_BYTES // row))

    def items() -> Iterator[torch.Tensor]:
        for start in range(0, hidden, step):
            stop = min(start + step, hidden)
            maps = torch.empty(layout.layers, layout.units, heads, stop - start, hidden)
            for layer in range(layout.layers):
                o = reader.slice(layout.parameter_name(layer, "o"))[:, :][start:stop].float()
                v = reader.slice(layout.parameter_name(layer, "v"))[:, :].float()
                columns = o.unflatten(1, (layout.units, heads, layout.head_dim))
                rows = columns.permute(1, 2, 0, 3).flatten(1, 2)  # (units, heads * rows, head_dim)
                torch.matmul(
                    rows,
                    v.unflatten(0, (layout.units, -1)),
                    out=maps[layer].view(layout.units, heads * (stop - start), hidden),
                )
            yield maps.flatten(2).flatten(0, 1)

    return Parts(-(-hidden // step), items())


# --- the gain of the norm -------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldedNorm:
    """A reader whose q, k and v have the gain of their layer's input norm folded in.

    RMSNorm multiplies every input feature by its gain, which differs from layer to layer; W and the
    gain together are what acts on the normalized state.
    """

    reader: Reader

    def slice(self, name: str) -> Any:
        """As the reader's own slice. Raises PostshareError where there is no gain."""
        where = HeadLayout.parse_name(name)
        if where is None or where[1] == "o":
            return self.reader.slice(name)
        norm = f"model.layers.{where[0]}.input_layernorm.weight"
        try:
            gain = self.reader.slice(norm)[:]
        except KeyError:
            raise PostshareError(
                f"the model has no weight {norm} to fold in; set plan.fold_norm=false"
            ) from None
        return _Scaled(self.reader.slice(name), gain.float())


@dataclass(frozen=True)
class _Scaled:
    view: Any
    gain: torch.Tensor

    def __getitem__(self, key: slice | tuple[slice, slice]) -> torch.Tensor:
        columns = key[1] if isinstance(key, tuple) else slice(None)
        return self.view[key].float() * self.gain[columns]
