"""The part of a plan that is Basis Sharing (2410.03765): adjacent layers on one basis.

The weights (out_features, hidden_size) of q of a group of layers are C_l B with one B (rank,
hidden_size) for the group and coefficients C_l (out_features, rank) for every layer; likewise those
of k and of v. o stays: the paper finds it worse to share. How the factors are found is
:mod:`~sa_models.materialize.shared_basis`. This file imports no torch: it also travels inside
compact exports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import PostshareError
from .heads import HeadLayout
from .ties import is_index, refuse_unknown

FACTORED = ("q", "k", "v")


@dataclass(frozen=True)
class SharedBasis:
    """Which layers share bases, and their ranks.

    Attributes:
        layers: adjacent layers that share one; the last group may be smaller. 1: each layer has its
            own, a low-rank approximation.
        q, k, v: the rank of every group.
    """

    layers: int
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]

    def ranks(self, projection: str) -> tuple[int, ...]:
        return {"q": self.q, "k": self.k, "v": self.v}[projection]

    def groups(self, layers: int) -> list[range]:
        """The groups of adjacent layers of a model of so many."""
        return layer_groups(layers, self.layers)

    def place(self, layer: int, projection: str) -> tuple[int, int]:
        """(first layer of the group, which holds the basis; rank)."""
        at = layer // self.layers
        return at * self.layers, self.ranks(projection)[at]

    def parameters(self, layout: HeadLayout) -> int:
        """Of the factors of q, k and v of all layers, each basis counted once."""
        sizes = factor_sizes(layout, self.layers)
        return sum(self.ranks(p)[at] * one for (p, at), (one, _) in sizes.items())

    def to_dict(self) -> dict[str, Any]:
        """The JSON value in a plan."""
        return {"layers": self.layers, "ranks": {p: list(self.ranks(p)) for p in FACTORED}}


def read_basis(value: Any) -> SharedBasis | None:
    """Read ``plan.basis``. Raises PostshareError for unknown keys and malformed entries."""
    if value is None:
        return None
    where = "plan.basis"
    if not isinstance(value, dict):
        raise PostshareError(f"{where} is {value!r}; give layers and ranks, or null")
    refuse_unknown(value, {"layers", "ranks"}, where)
    layers: Any = value.get("layers")
    ranks = value.get("ranks")
    if not is_index(layers) or layers < 1:
        raise PostshareError(f"{where}.layers is {layers!r}; give an integer of at least 1")
    if not isinstance(ranks, dict) or ranks.keys() != set(FACTORED):
        raise PostshareError(f"{where}.ranks is {ranks!r}; give the lists q, k and v")
    for p, numbers in ranks.items():
        if not isinstance(numbers, list) or not all(is_index(n) and n > 0 for n in numbers):
            raise PostshareError(
                f"{where}.ranks.{p} is {numbers!r}; give a positive integer for every group"
            )
    return SharedBasis(layers, *(tuple(ranks[p]) for p in FACTORED))


def check_basis(basis: SharedBasis, layout: HeadLayout) -> None:
    """Raises PostshareError for ranks that do not fit the groups of layers."""
    groups = basis.groups(layout.layers)
    for p in FACTORED:
        ranks, (rows, columns) = basis.ranks(p), layout.shape(p)
        if len(ranks) != len(groups):
            raise PostshareError(
                f"plan.basis.ranks.{p} has {len(ranks)} entries; {layout.layers} layers in groups "
                f"of {basis.layers} need {len(groups)}"
            )
        for at, (rank, group) in enumerate(zip(ranks, groups, strict=True)):
            most = min(columns, len(group) * rows)
            if rank > most:
                raise PostshareError(
                    f"plan.basis.ranks.{p}[{at}] is {rank}; the weights of its layers have rank "
                    f"{most} at most"
                )


def layer_groups(layers: int, size: int) -> list[range]:
    """Groups of ``size`` adjacent layers; the last one may be smaller."""
    return [range(start, min(start + size, layers)) for start in range(0, layers, size)]


def factor_sizes(layout: HeadLayout, size: int) -> dict[tuple[str, int], tuple[int, int]]:
    """{(projection, group): (parameters of one rank, parameters of the dense weights)}."""
    found = {}
    for p in FACTORED:
        rows, columns = layout.shape(p)
        for at, group in enumerate(layer_groups(layout.layers, size)):
            found[p, at] = (columns + len(group) * rows, len(group) * rows * columns)
    return found


def parameter_range(layout: HeadLayout, size: int) -> tuple[int, int]:
    """Parameters of q, k and v of all layers: of factors of rank 1, and of the dense weights."""
    sizes = factor_sizes(layout, size).values()
    return sum(one for one, _ in sizes), sum(dense for _, dense in sizes)


def basis_of(layout: HeadLayout, size: int, parameters: int) -> SharedBasis | None:
    """The ranks with which q, k and v of all layers take at most so many parameters.

    All factors get the same share of their dense size, rounded down; what is left goes to them one
    rank at a time, from the first group on, as long as a rank fits.

    Args:
        size: adjacent layers that share a basis.
        parameters: of all factors.

    Returns:
        None where a factor would have no rank, or the dense weights are no larger.
    """
    sizes, (least, whole) = factor_sizes(layout, size), parameter_range(layout, size)
    if not least <= parameters < whole:
        return None
    ranks = {
        key: max(1, parameters * dense // (whole * one)) for key, (one, dense) in sizes.items()
    }
    left = parameters - sum(ranks[key] * one for key, (one, _) in sizes.items())
    if left < 0:
        return None
    # A rank more must still take less than the dense weights.
    while fitting := [
        key for key, (one, dense) in sizes.items() if one <= left and (ranks[key] + 1) * one < dense
    ]:
        for key in fitting:
            if sizes[key][0] <= left:
                ranks[key] += 1
                left -= sizes[key][0]
    groups = range(len(layer_groups(layout.layers, size)))
    return SharedBasis(size, *(tuple(ranks[p, at] for at in groups) for p in FACTORED))


def basis_name(first: int, projection: str) -> str:
    """The parameter's name in the first layer of its group."""
    return f"model.layers.{first}.self_attn.{projection}_proj.basis.weight"


def coefficients_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj.coefficients.weight"


__all__ = [
    "FACTORED",
    "SharedBasis",
    "basis_of",
    "check_basis",
    "factor_sizes",
    "parameter_range",
    "read_basis",
]
