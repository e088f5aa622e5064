"""Merges that look at a head's gauge: they write kept projections too.

Shared slices stay one slice. ``aligned_mean`` brings every target into its source's gauge
(:mod:`sa_models.materialize.gauge`) and takes the mean there; a target that shares only one of q
and k, or of v and o, keeps the other in the source's gauge, so that only the averaging changes what
it computes. ``absorb`` copies; where v is shared and o kept, o becomes the one with which the
target comes closest to what it did. ``weighted_mean`` and ``least_squares`` bring targets there
too, and weigh them by what they do on calibration text:
:mod:`sa_models.materialize.merge_calibrated`.

Everything is computed in float64 from contiguous copies and rounded once to the dtype of the
weights, so that materializing in memory and tensor by tensor gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import NamedTuple

import torch

from sa_models.errors import PostshareError
from sa_models.materialize.gauge import (
    PlaneAlignment,
    ValueAlignment,
    absorbed,
    align_planes,
    align_values,
)
from sa_models.materialize.registry import GAUGED, IN_GAUGE, Merge
from sa_models.plan import HeadTie, SharingPlan, Unit

PAIRS = ("qk", "vo")

Read = Callable[[str, Unit], torch.Tensor]
"""(projection, unit) -> its slice before merging, (width, hidden_size)."""
Slices = dict[tuple[str, Unit], torch.Tensor]
Gauge = PlaneAlignment | ValueAlignment


class Member(NamedTuple):
    """A unit that is merged.

    Attributes:
        rows: its slice in the source's gauge, float64 (width, hidden_size).
        gauge: what brought it there; None: the source itself.
    """

    unit: Unit
    rows: torch.Tensor
    gauge: Gauge | None


Average = Callable[[str, list[Member]], torch.Tensor]
"""(projection, the source and the targets that share it) -> their one slice, as `Member.rows`."""


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
    if merge not in IN_GAUGE:
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


def mean(projection: str, members: list[Member]) -> torch.Tensor:
    """The plain mean, an :data:`Average`."""
    total = members[0].rows.clone()
    for member in members[1:]:
        total += member.rows
    return total / len(members)


def read_pair(group: Group, unit: Unit, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """Both projections of a unit, float64 (width, hidden_size)."""
    # As contiguous copies: products of other strides may round differently.
    one, two = (read(p, unit).double().contiguous() for p in group.pair)
    return one, two


def gauges(group: Group, head_dim: int, read: Read) -> dict[Unit, Gauge]:
    """What brings every target of a group into the gauge of its source."""
    source = read_pair(group, group.source, read)
    found: dict[Unit, Gauge] = {}
    for target, _ in group.targets:
        mine = read_pair(group, target, read)
        planes = group.pair == "qk"
        found[target] = (
            align_planes(source, mine, head_dim) if planes else align_values(source, mine)
        )
    return found


def merge_group(
    group: Group, merge: Merge, head_dim: int, read: Read, average: Average = mean
) -> Slices:
    """The new slices of a group's units, in the dtype of the source's.

    Args:
        average: of the slices that become one; ``absorb`` takes none.
    """
    dtype = read(group.pair[0], group.source).dtype
    change = resolve_name(GAUGED[merge]) if merge in GAUGED else averaged
    new = change(group, head_dim, read, average)
    return {where: value.to(dtype) for where, value in new.items()}


def averaged(group: Group, head_dim: int, read: Read, average: Average) -> Slices:
    """The targets in the source's gauge, and the average of what is shared."""
    source = read_pair(group, group.source, read)
    members = {
        p: [Member(group.source, rows, None)] for p, rows in zip(group.pair, source, strict=True)
    }
    found, new = gauges(group, head_dim, read), Slices()
    for target, shared in group.targets:
        gauge = found[target]
        for p, rows in zip(group.pair, read_pair(group, target, read), strict=True):
            part = gauge.apply(p, rows)
            if p in shared:
                members[p].append(Member(target, part, gauge))
            else:
                new[p, target] = part
    for p, merged in members.items():
        if len(merged) > 1:
            value = average(p, merged)
            new.update({(p, member.unit): value for member in merged})
    return new


def absorbing(group: Group, head_dim: int, read: Read, average: Average) -> Slices:
    """Copies; where v is shared and o kept, the o that fits the source's v best."""
    source = read_pair(group, group.source, read)
    new = Slices()
    for target, shared in group.targets:
        new.update({(p, target): x for p, x in zip(group.pair, source, strict=True) if p in shared})
        if shared == "v":
            new["o", target] = absorbed(*read_pair(group, target, read), source[0])
    return new
