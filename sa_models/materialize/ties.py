"""Ties and removed units of a plan, written into dense weights.

After it, every target slice equals its source slice bit for bit, every slice of a removed unit is
zero and the norm before the attention of a dropped layer is one, so the dense model computes what
the compact one computes. Sources are read before anything is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pkgutil import resolve_name

import torch

from sa_models.errors import PostshareError
from sa_models.heads import PROJECTIONS, HeadLayout, unit_view
from sa_models.materialize.merge import groups, merge_group
from sa_models.materialize.registry import GAUGED, MEASURED, PLAIN, Merge
from sa_models.plan import HeadTie, SharingPlan
from sa_models.ties import Unit


def merge_slices(slices: list[torch.Tensor], merge: Merge) -> torch.Tensor:
    """The one slice that a source and its targets share, (width, hidden_size).

    Args:
        slices: the source first, then its targets.
        merge: ``copy`` takes the source (the papers); ``mean`` the average of all, summed in
            fp32 in the order given and rounded once.

    Raises:
        PostshareError: they differ, and the merge needs calibration text.
    """
    if merge not in MEASURED:
        return resolve_name(PLAIN[merge])(slices)
    if _equal(slices):
        return slices[0]
    raise PostshareError(
        f"merge {merge} needs calibration text, and the units of a tie are not one yet; call "
        "merge_on_text_ first, or set materialize.merge=aligned_mean"
    )


def first(slices: list[torch.Tensor]) -> torch.Tensor:
    """The source's."""
    return slices[0]


def mean(slices: list[torch.Tensor]) -> torch.Tensor:
    """Summed in fp32 in the order given, rounded once."""
    if _equal(slices):
        return slices[0]  # the rounded mean of equal values need not be theirs
    total = slices[0].to(torch.float32, copy=True)
    for other in slices[1:]:
        total += other
    return (total / len(slices)).to(slices[0].dtype)


def _equal(slices: list[torch.Tensor]) -> bool:
    return all(torch.equal(slices[0], other) for other in slices[1:])


def shared_slices(ties: Iterable[HeadTie]) -> dict[tuple[str, int, int], list[tuple[int, int]]]:
    """{(projection, source layer, source unit): its targets, in the order of the plan}."""
    targets: dict[tuple[str, int, int], list[tuple[int, int]]] = defaultdict(list)
    for tie in ties:
        for projection in tie.projections:
            targets[(projection, *tie.source)].append(tie.target)
    return dict(targets)


@torch.no_grad()
def materialize_(
    parameters: Mapping[str, torch.Tensor],
    layout: HeadLayout,
    plan: SharingPlan,
    merge: Merge = "copy",
) -> None:
    """Write the plan's ties and removed units into the weights, in place.

    Args:
        parameters: {name: weight}, e.g. ``dict(model.named_parameters())`` of a dense Llama.
        layout: the model's attention shape.
        plan: validated; a ``released`` plan is reduced to its effective ties first.
        merge: see :func:`merge_slices`, and :mod:`sa_models.materialize.merge` for the others.

    Raises:
        PostshareError: a weight that the plan needs is not there; or the merge needs text, and
            :func:`~sa_models.materialize.merge_calibrated.merge_on_text_` was not called before.
    """
    copy_ties_(parameters, layout, plan.effective().ties, merge)
    zero_units_(parameters, layout, plan.removed)
    for layer in plan.dropped(layout):
        parameters[layout.norm_name(layer)].fill_(1.0)  # nothing reads it


@torch.no_grad()
def copy_ties_(
    parameters: Mapping[str, torch.Tensor],
    layout: HeadLayout,
    ties: Iterable[HeadTie],
    merge: Merge = "copy",
) -> None:
    """The ties of :func:`materialize_` alone: each target takes its source's original weights.

    Chains are not followed, which is how the golden numbers define DirectShare "as paired".
    """
    new = {}
    if merge in GAUGED:
        for group in groups(ties):
            merged_units = merge_group(
                group, merge, layout.head_dim, lambda p, u: unit(parameters, layout, p, *u)
            )
            new.update({(p, *where): value for (p, where), value in merged_units.items()})
        ties = ()
    for (projection, *source), targets in shared_slices(ties).items():
        units = [
            unit(parameters, layout, projection, *u) for u in ((source[0], source[1]), *targets)
        ]
        merged = merge_slices(units, merge).clone()
        new.update({(projection, *target): merged for target in targets})
        if merge != "copy":
            new[(projection, source[0], source[1])] = merged
    for (projection, layer, index), value in new.items():
        unit(parameters, layout, projection, layer, index).copy_(value)


@torch.no_grad()
def zero_units_(
    parameters: Mapping[str, torch.Tensor], layout: HeadLayout, removed: Iterable[Unit]
) -> None:
    """Write zeros into q, k, v and o of the removed units, which then add nothing to the output."""
    for layer, index in removed:
        for projection in PROJECTIONS:
            unit(parameters, layout, projection, layer, index).zero_()


def unit(
    parameters: Mapping[str, torch.Tensor],
    layout: HeadLayout,
    projection: str,
    layer: int,
    index: int,
) -> torch.Tensor:
    """A view of one unit's slice, (width, hidden_size)."""
    name = layout.parameter_name(layer, projection)
    if name not in parameters:
        raise PostshareError(f"the model has no weight {name}; materialize a dense Llama")
    return unit_view(parameters[name], layout, projection)[index]
