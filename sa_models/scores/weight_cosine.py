"""Scores between the units of a model: how alike their weights are.

A score is the cosine of two units' flattened, concatenated projection weights (PostShare,
arXiv 2402.11819, section 3), or of what the weights alone say about the head's function
(``softmax``). All pairs come from one Gram matrix per projection, accumulated over slices of the
input features, so that memory is bounded and the work is matrix products.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from sa_models.calibration.progress import Progress
from sa_models.heads import HeadLayout
from sa_models.plan import Unit
from sa_models.scores.significance import PairTerms, Terms, over, sum_terms

TIE_TOLERANCE = 1e-6
"""Scores closer than this are equal: the earliest source wins (fp32 cosines are no finer)."""

CHUNK_BYTES = 1 << 30
BLOCK_UNITS = 256


class Reader(Protocol):
    """What scoring needs of a model: for example WeightsFolder."""

    def slice(self, name: str) -> torch.Tensor:
        """An object whose ``[:, a:b]`` reads columns a to b of the weight, ``[a:b]`` rows."""


def unit_scores(
    reader: Reader, layout: HeadLayout, score: str = "qk", progress: Progress | None = None
) -> torch.Tensor:
    """Cosine between every two units of a model.

    Args:
        reader: the dense weights.
        score: ``q``, ``k``, ``v``, ``qk``, ``qkv``: the projections that are compared;
            ``softmax``: softmax(W_q W_k^T) W_v of every query head.

    Returns:
        float64 (layers * units, layers * units), symmetric, ones on the diagonal; zeros for a unit
        of zeros. The unit (layer, u) has index layer * units + u.
    """
    if score == "softmax":
        gram = gram_matrix(_head_functions(reader, layout), layout, progress)
    else:
        parts = _column_chunks(reader, layout, score)
        gram = gram_matrix(parts, layout, progress)
    return cosines(gram)


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Of all pairs, from their inner products; 0 for one without a length, also with itself."""
    norms = products.diagonal().sqrt()
    lengths = norms[:, None] * norms[None, :]
    return torch.where(lengths > 0, products / lengths, 0.0)


def cosine_terms(reader: Reader, layout: HeadLayout, score: str) -> PairTerms:
    """The terms of these scores, for p-values."""

    @lru_cache(maxsize=64)
    def weight(unit: Unit, projection: str) -> torch.Tensor:
        return unit_weight(reader, layout, projection, unit).double()

    def terms(target: Unit, source: Unit) -> Terms:
        if score == "softmax":
            a, b = (_function(*(weight(u, p) for p in "qkv")) for u in (target, source))
        else:
            a, b = (torch.cat([weight(u, p) for p in score]) for u in (target, source))
        return sum_terms(values=over((a * b).sum(0), a.norm() * b.norm()))

    return terms


def _function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(W_q W_k^T) W_v of the heads of a unit; signs of inputs change its columns only."""
    heads = q.unflatten(0, (-1, len(k)))
    return (torch.softmax(heads @ k.T, dim=-1) @ v).flatten(0, 1)


def unit_weight(reader: Reader, layout: HeadLayout, projection: str, unit: Unit) -> torch.Tensor:
    """The slice of one unit, fp32 (width, hidden_size); only it is read."""
    view = reader.slice(layout.parameter_name(unit[0], projection))
    start = unit[1] * layout.width(projection)
    stop = start + layout.width(projection)
    part = view[:, start:stop].t() if projection == "o" else view[start:stop]
    return part.float()


@dataclass(frozen=True)
class Matches:
    """The best source of every unit.

    Attributes:
        scores: float64 (layers, units); layer 0 has no sources: nan.
        sources: int64 (layers, units, 2), (layer, unit) of the source; -1 for layer 0.
    """

    scores: torch.Tensor
    sources: torch.Tensor


def best_matches(
    scores: torch.Tensor, layout: HeadLayout, without: Collection[int] = ()
) -> Matches:
    """For every unit, the unit of a strictly earlier layer with the highest score.

    Scores within 1e-6 of the highest are ties; the earliest (layer, then unit) wins.

    Args:
        without: layers whose units are no sources. Layer 0 is none of them.
    """
    units = layout.units
    best = torch.full((layout.layers, units), float("nan"), dtype=torch.float64)
    sources = torch.full((layout.layers, units, 2), -1, dtype=torch.long)
    for layer in range(1, layout.layers):
        rows = scores[layer * units : (layer + 1) * units, : layer * units].clone()
        for other in set(without) & set(range(layer)):
            rows[:, other * units : (other + 1) * units] = -torch.inf
        highest = rows.max(dim=1).values
        first = (rows >= highest[:, None] - TIE_TOLERANCE).int().argmax(dim=1)
        best[layer] = rows.gather(1, first[:, None])[:, 0]
        sources[layer] = torch.stack([first // units, first % units], dim=1)
    return Matches(best, sources)


def random_matches(layout: HeadLayout, seed: int, without: Collection[int] = ()) -> Matches:
    """The control: a source drawn evenly from the earlier layers, targets in random order.

    Args:
        without: layers whose units are no sources. Layer 0 is none of them.
    """
    generator = torch.Generator().manual_seed(seed)
    units = layout.units
    best = torch.full((layout.layers, units), float("nan"), dtype=torch.float64)
    sources = torch.full((layout.layers, units, 2), -1, dtype=torch.long)
    for layer in range(1, layout.layers):
        best[layer] = torch.rand(units, generator=generator, dtype=torch.float64)
        earlier = torch.tensor([other for other in range(layer) if other not in without])
        drawn = torch.randint(len(earlier) * units, (units,), generator=generator)
        sources[layer] = torch.stack([earlier[drawn // units], drawn % units], dim=1)
    return Matches(best, sources)


# --- Gram matrices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Pieces of the units' feature vectors, (all units, features) fp32 each, and their number."""

    count: int
    items: Iterator[torch.Tensor]


def gram_matrix(parts: Parts, layout: HeadLayout, progress: Progress | None) -> torch.Tensor:
    """Inner products of all units' feature vectors, float64 (all units, all units)."""
    total = layout.layers * layout.units
    gram = torch.zeros(total, total, dtype=torch.float64)
    for done, features in enumerate(parts.items, start=1):
        for start in range(0, total, BLOCK_UNITS):
            stop = min(start + BLOCK_UNITS, total)
            # The lower triangle is enough, and half the work; fp32 products are added in fp64.
            gram[start:stop, :stop] += features[start:stop] @ features[:stop].T
        if progress is not None:
            progress(done, parts.count)
    return gram.tril() + gram.tril(-1).T


def _column_chunks(reader: Reader, layout: HeadLayout, projections: str) -> Parts:
    """The units' rows of the projections, a range of input features at a time."""
    plan = []
    for projection in projections:
        column_bytes = 4 * layout.layers * layout.units * layout.width(projection)
        columns = max(1, min(layout.hidden_size, CHUNK_BYTES // column_bytes))
        plan += [
            (projection, start, min(start + columns, layout.hidden_size))
            for start in range(0, layout.hidden_size, columns)
        ]

    def items() -> Iterator[torch.Tensor]:
        for projection, start, stop in plan:
            features = torch.empty(
                layout.layers, layout.units, layout.width(projection) * (stop - start)
            )
            for layer in range(layout.layers):
                weight = reader.slice(layout.parameter_name(layer, projection))[:, start:stop]
                features[layer].copy_(weight.reshape(layout.units, -1))
            yield features.flatten(0, 1)

    return Parts(len(plan), items())


def _head_functions(reader: Reader, layout: HeadLayout) -> Parts:
    """softmax(W_q W_k^T) W_v of the query heads of every unit, one head of each unit at a time."""

    def weight(layer: int, projection: str) -> torch.Tensor:
        rows = reader.slice(layout.parameter_name(layer, projection))[:, :].float()
        return rows.unflatten(0, (layout.units, -1, layout.head_dim))

    def items() -> Iterator[torch.Tensor]:
        for head in range(layout.heads_per_unit):
            features = torch.empty(layout.layers, layout.units, layout.head_dim, layout.hidden_size)
            for layer in range(layout.layers):
                q, k, v = weight(layer, "q")[:, head], weight(layer, "k"), weight(layer, "v")
                attention = torch.softmax(q @ k[:, 0].transpose(1, 2), dim=-1)
                features[layer] = attention @ v[:, 0]
            yield features.flatten(2).flatten(0, 1)

    return Parts(layout.heads_per_unit, items())
