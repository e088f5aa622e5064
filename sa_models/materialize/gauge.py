"""The gauge of a head, changed to another's: the same function, in weights that are closest.

A head's weights may be changed without changing its function: v and o by any invertible M, q and k
of a RoPE plane by a common angle and by inverse scales. Before two heads are averaged, or one is
pulled to the other, one of them is brought into the other's gauge. One transform for a KV group
under GQA.

* q and k, for every RoPE plane: the scale that gives q and k the ratio of norms that they have in
  the source, and the angle arg c_i of :mod:`sa_models.scores.gauge_invariant`.
* v and o: a gauge in which V V' = O' O (summed over the query heads) is unique up to a rotation;
  both heads are brought there, rotated onto one another by orthogonal Procrustes on v and o
  together, and back into the source's gauge: an invertible M, as well conditioned as the heads.

Where v is replaced by the source's and o is kept, no such M is best: the o that comes closest to
what the head did is O V V_new^+ (:func:`absorbed`), which is small where the heads have nothing in
common.

All is computed in float64. Slices are those of :func:`sa_models.heads.unit_view`, (width, hidden):
o is transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sa_models.scores.gauge_invariant import planes

FLOOR = 1e-12
"""Eigenvalues below this, relative to the largest, are raised to it: M stays invertible."""


@dataclass(frozen=True)
class PlaneAlignment:
    """Factors of every RoPE plane, complex128 (head_dim/2,): plane z of q becomes q * z."""

    q: torch.Tensor
    k: torch.Tensor

    def apply(self, projection: str, rows: torch.Tensor) -> torch.Tensor:
        """q or k of the target, (width, hidden), in the source's gauge; float64."""
        factor = (self.q if projection == "q" else self.k)[:, None]
        pairs = rows.double().unflatten(0, (-1, 2, len(factor)))
        z = torch.complex(pairs[:, 0], pairs[:, 1]) * factor
        return torch.stack([z.real, z.imag], dim=1).flatten(0, 2)


def align_planes(
    source: tuple[torch.Tensor, torch.Tensor],
    target: tuple[torch.Tensor, torch.Tensor],
    head_dim: int,
) -> PlaneAlignment:
    """The gauge of q and k in which a target is closest to its source.

    Args:
        source, target: (q, k) of a unit, each (width, hidden).

    Returns:
        Factors with q * conj(k) = 1, so that every product of a query with a key stays. A plane of
        which either side is zero keeps its own gauge.
    """
    columns = source[0].shape[1]
    balanced, sizes = [], []
    for q, k in (source, target):
        balanced.append(planes(q.double(), k.double(), head_dim))
        q_size, k_size = (
            rows.double().unflatten(0, (-1, 2, head_dim // 2)).square().sum((0, 1, 3)).sqrt()
            for rows in (q, k)
        )
        sizes.append((q_size, k_size))
    c = balanced[0].unflatten(1, (-1, columns)) * balanced[1].unflatten(1, (-1, columns)).conj()
    c = c.sum((1, 2))
    (source_q, source_k), (target_q, target_k) = sizes
    alive = (source_q * source_k * target_q * target_k > 0) & (c.abs() > 0)
    scale = torch.where(alive, source_q * target_k / (source_k * target_q), 1.0).sqrt()
    turn = torch.where(alive, c / c.abs(), 1.0 + 0j)
    return PlaneAlignment(turn * scale, turn / scale)


@dataclass(frozen=True)
class ValueAlignment:
    """v becomes M v, and o becomes o M^-1: float64 (head_dim, head_dim), both."""

    m: torch.Tensor
    inverse: torch.Tensor

    def apply(self, projection: str, rows: torch.Tensor) -> torch.Tensor:
        """v or o of the target, (width, hidden), in the source's gauge; float64."""
        matrix = self.m if projection == "v" else self.inverse.T
        return (matrix @ rows.double().unflatten(0, (-1, len(matrix)))).flatten(0, 1)


def align_values(
    source: tuple[torch.Tensor, torch.Tensor], target: tuple[torch.Tensor, torch.Tensor]
) -> ValueAlignment:
    """The gauge of v and o in which a target is closest to its source, as this module says.

    Args:
        source, target: (v, o) of a unit, each (width, hidden).

    A unit of which v or o is zero leaves every gauge as it is.
    """
    d = source[0].shape[0]
    if not all(bool(part.any()) for part in (*source, *target)):
        same = torch.eye(d, dtype=torch.float64)
        return ValueAlignment(same, same)
    (to_source, from_source), (to_target, from_target) = (_balance(*u) for u in (source, target))
    # In the balanced gauge the best rotation of v and o together.
    overlap = to_source @ source[0].double() @ (to_target @ target[0].double()).T
    o_source, o_target = (u[1].double().unflatten(0, (-1, d)) for u in (source, target))
    overlap = overlap + from_source.T @ (o_source @ o_target.mT).sum(0) @ from_target
    left, _, right = torch.linalg.svd(overlap)
    rotation = left @ right
    return ValueAlignment(from_source @ rotation @ to_target, from_target @ rotation.T @ to_source)


def _balance(v: torch.Tensor, o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P and its inverse with (P V)(P V)' = (O P^-1)' (O P^-1): P = S^1/2, S A S = G."""
    d = len(v)
    heads = o.double().unflatten(0, (-1, d))
    a, g = v.double() @ v.double().T, (heads @ heads.mT).sum(0)
    root, inverse_root = _powers(a)
    middle = _powers(root @ g @ root)[0]
    return _powers(inverse_root @ middle @ inverse_root)


def _powers(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a symmetric positive matrix other than 0, and the inverse of that."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    roots = values.clamp_min(FLOOR * float(values[-1])).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def absorbed(v: torch.Tensor, o: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The o with which a head that now reads values ``new`` comes closest to what it did.

    argmin over o' of |O' V_new - O V|, the Frobenius norm of the map from input to residual
    stream, for every query head: O V V_new^+.

    Args:
        v: (head_dim, hidden), the head's own values.
        o: (width, hidden), what it writes, transposed.
        new: (head_dim, hidden), the values that replace ``v``.

    Returns:
        float64 (width, hidden).
    """
    d = len(v)
    n = torch.linalg.lstsq(new.double().T, v.double().T).solution.T  # v ~ n new
    return (n.T @ o.double().unflatten(0, (-1, d))).flatten(0, 1)
