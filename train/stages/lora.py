"""Merged adapters of a run: how far apart the units are that will be made one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sa_models.heads import HeadLayout, unit_view
from train.models.sharded_source import dense_weights
from train.stages.run import Run


def report_merged(current: Run, before: Path, after: Path) -> None:
    """Say how far apart tied units are in the merged weights, which are to be made one."""
    section, plan = current.recipe.lora, current.plan
    if section is None or not plan.ties:
        return

    def work() -> None:
        found = [distances(current, folder) for folder in (before, after)]
        (first, _), (mean, worst) = ((sum(d) / len(d), max(d)) for d in found)
        current.say(
            f"lora      rank {section.rank} of {', '.join(section.targets)} merged: tied units are "
            f"{mean:.1%} of their norm apart on average, {worst:.1%} at most ({first:.1%} before)"
        )

    current.on_main(work)


def distances(current: Run, folder: Path) -> list[float]:
    """||target - source|| / ||source|| of every projection of every tie in a folder's weights."""
    weights = dense_weights(folder, current.plan, current.leaders)
    layout = HeadLayout.from_config(weights.config)

    def unit(place: tuple[int, int], projection: str) -> Tensor:
        whole = weights.read(layout.parameter_name(place[0], projection)).float()
        return unit_view(whole, layout, projection)[place[1]]

    found = []
    for tie in current.plan.ties:
        for projection in tie.projections:
            source = unit(tie.source, projection)
            target = unit(tie.target, projection)
            apart = float((target - source).norm())
            found.append(apart / float(source.norm() or target.norm() or 1))
    return found
