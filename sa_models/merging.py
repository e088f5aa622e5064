"""Merges that look at a head's gauge: they write kept projections too.

Shared slices stay one slice. ``aligned_mean`` brings every target into its source's gauge
(:mod:`sa_models.alignment`) and takes the mean there; a target that shares only one of q and k, or
of v and o, keeps the other in the source's gauge, so that only the averaging changes what it
computes. ``absorb`` copies; where v is shared and o kept, o becomes the one with which the target
comes closest to what it did.

Everything is computed in float64 from contiguous copies and rounded once to the dtype of the
weights, so that materializing in memory and tensor by tensor gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from .alignment import absorbed, align_planes, align_values
from .errors import PostshareError
from .plan import HeadTie, SharingPlan, Unit

Merge = Literal["copy", "mean", "aligned_mean", "absorb"]
GAUGED: tuple[Merge, ...] = ("aligned_mean", "absorb")
PAIRS = ("qk", "vo")

Read = Callable[[str, Unit], torch.Tensor]
"""(projection, unit) -> its slice before merging, (width, hidden_size)."""
Slices = dict[tuple[str, Unit], torch.Tensor]


@dataclass(frozen=True)
class Group:
    """The units that share projections of one pair (q and k, or v and o) with one source.

    Attributes:
        targets: every target, with the projections of the pair that it shares.
    """

    pair: str
    source: Unit
    targets: tuple[tuple[Unit, str], ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        return (self.source, *(target for target, _ in self.targets))


def groups(ties: Iterable[HeadTie]) -> list[Group]:
    """The groups of a plan's ties, in the order of the plan.

    Raises:
        PostshareError: a unit would have to be in two gauges: its q and k (or v and o) come from
            two sources, or it keeps one of them that others share.
    """
    ties = tuple(ties)
    shared: dict[tuple[str, Unit], dict[Unit, str]] = {}
    source_of: dict[tuple[str, Unit], Unit] = {}
    for tie in ties:
        for pair in PAIRS:
            projections = "".join(p for p in pair if p in tie.projections)
            if not projections:
                continue
            if source_of.setdefault((pair, tie.target), tie.source) != tie.source:
                raise PostshareError(
                    f"unit {list(tie.target)} takes {pair[0]} and {pair[1]} from two sources, "
                    "which no gauge of it fits; set materialize.merge to copy or mean"
                )
            targets = shared.setdefault((pair, tie.source), {})
            targets[tie.target] = targets.get(tie.target, "") + projections
    for pair, source in shared:
        if (pair, source) in source_of:
            raise PostshareError(
                f"unit {list(source)} keeps one of {pair[0]} and {pair[1]}, which others share, "
                "and takes the other; set materialize.merge to copy or mean"
            )
    return [
        Group(pair, source, tuple(targets.items())) for (pair, source), targets in shared.items()
    ]


def check_merge(plan: SharingPlan, merge: Merge) -> None:
    """Refuse a merge that the plan leaves no use for, or cannot have.

    Raises:
        PostshareError: see :func:`groups`; ``absorb`` where no tie shares v and keeps o; or a layer
            that lacks a projection which would be aligned.
    """
    if merge not in GAUGED:
        return
    found = groups(plan.effective().ties)
    if merge == "absorb" and not any(
        projections == "v" for group in found for _, projections in group.targets
    ):
        raise PostshareError(
            "materialize.merge absorb changes o where v is shared and o kept, and no tie does "
            "that; set materialize.merge=copy, or plan.share=[q, k, v]"
        )
    absent = plan.absent()
    for group in found:
        for layer, unit in group.units:
            for p in group.pair:
                if (layer, p) in absent:
                    raise PostshareError(
                        f"unit {[layer, unit]} has no {p}, which its span shares, and cannot be "
                        "aligned; set materialize.merge to copy or mean"
                    )


def merge_group(group: Group, merge: Merge, head_dim: int, read: Read) -> Slices:
    """The new slices of a group's units, in the dtype of the source's.

    Raises:
        PostshareError: a unit whose v or o is zero.
    """
    first, second = group.pair[0], group.pair[1]
    dtype = read(first, group.source).dtype

    def both(unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
        # As contiguous copies: products of other strides may round differently.
        one, two = (read(p, unit).double().contiguous() for p in group.pair)
        return one, two

    source = both(group.source)
    totals = {p: part.clone() for p, part in zip(group.pair, source, strict=True)}
    counts = {first: 1, second: 1}
    sharers = {p: [t for t, shared in group.targets if p in shared] for p in group.pair}
    new: Slices = {}
    for target, shared in group.targets:
        mine = both(target)
        if merge == "absorb":
            if shared == "v":
                new["o", target] = absorbed(*mine, source[0])
            continue
        if group.pair == "qk":
            planes = align_planes(source, mine, head_dim)
            parts = {p: planes.apply(p, x) for p, x in zip(group.pair, mine, strict=True)}
        else:
            values = align_values(source, mine)
            parts = {p: values.apply(p, x) for p, x in zip(group.pair, mine, strict=True)}
        for p, part in parts.items():
            if p in shared:
                totals[p] += part
                counts[p] += 1
            else:
                new[p, target] = part
    for p, targets in sharers.items():
        merged = totals[p] / counts[p]
        new.update({(p, unit): merged for unit in targets})
        if merge != "absorb" and targets:
            new[p, group.source] = merged
    return {where: value.to(dtype) for where, value in new.items()}
