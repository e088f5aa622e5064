"""The picture of a search: quality against what is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.common.figure_style import (
    BLUE,
    FILE_STYLE,
    GREEN,
    GRID,
    MUTED,
    SKY,
    SMALL,
    VERMILLION,
    WIDTH,
    save,
)
from train.common.sizes import byte_unit
from train.planning.search.auto_result import BASIS, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import LlamaConfig

    from sa_models.plan import SharingPlan
    from train.planning.search.auto_result import AutoResult, Point, Timed


@rc_context(FILE_STYLE)
def save_pareto(
    removed: Sequence[int], losses: Sequence[float], parameters: int, size: int, path: Path
) -> None:
    """Perplexity on calibration text against parameters removed, along the path, as PNG and SVG.

    Args:
        removed: parameters that are no longer stored, 0 first.
        losses: nats per token, of the dense model first.
        parameters: of the dense model.
        size: bytes of one parameter.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shares = [100 * count / parameters for count in removed]
    perplexities = [math.exp(loss) for loss in losses]
    axes.plot(shares, perplexities, color=BLUE, marker="o", markersize=3.5, linewidth=1.2)
    axes.axhline(perplexities[0], color=MUTED, linewidth=0.8, linestyle="--", zorder=0)
    axes.annotate("dense", (shares[-1], perplexities[0]), ha="right", va="bottom", size=SMALL)
    axes.set_xlabel("parameters no longer stored, % of the model")
    axes.set_ylabel("perplexity on calibration text, untrained")
    whole = parameters * size
    unit, factor = byte_unit(whole)
    above = axes.secondary_xaxis(
        "top",
        functions=(
            lambda share: (1 - np.asarray(share) / 100) * whole / factor,
            lambda stored: 100 * (1 - np.asarray(stored) * factor / whole),
        ),
    )
    above.xaxis.set_major_locator(MaxNLocator(4))
    above.set_xlabel(f"{unit} stored")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_title(f"{perplexities[0]:.2f} to {perplexities[-1]:.2f} at {shares[-1]:.1f} %")
    save(figure, path)


@rc_context(FILE_STYLE)
def save_front(
    searched: AutoResult,
    front: Sequence[Point],
    timed: Sequence[Timed],
    noisy: bool,
    config: LlamaConfig,
    size: int,
    path: Path,
) -> None:
    """Quality against bytes, and against the time of decoding a token, as PNG and SVG; where plans
    were compared after reconstruction, that as well.

    Args:
        front: see :func:`~train.planning.search.auto_report.pareto_points`.
        noisy: whether the times are worth nothing: then the bytes that a token reads are drawn.
        size: bytes of one exported parameter.
    """
    rebuilt = searched.base_rebuilt is not None
    figure = Figure(figsize=(WIDTH, 10.8 if rebuilt else 7.4), layout="constrained")
    upper, lower, *more = figure.subplots(3 if rebuilt else 2, 1)
    lower.sharey(upper)
    chosen = searched.chosen.points[-1]
    whole = chosen.plan.savings(config).bytes(size)[0]
    unit, factor = byte_unit(whole)

    def stored(plan: SharingPlan) -> float:
        return plan.savings(config).bytes(size)[1] / factor

    def place(point: Point) -> tuple[float, float]:
        return stored(point.plan), math.exp(point.expected)

    # Far above the chosen plan nothing is to be read, and it would flatten the rest.
    bottom = math.exp(min(point.expected for point in front))
    span = math.exp(chosen.expected) - bottom + 0.01 * bottom
    upper.set_ylim(bottom - 0.2 * span, bottom + 3 * span)
    for name, color in (("search", MUTED), ("structure", SKY)):
        shown = [
            place(p) for p in searched.points if (p.origin == "structure") == (name == "structure")
        ]
        label = {"search": "measured by a search", "structure": "spans or KV groups alone"}[name]
        if shown:
            upper.scatter(*zip(*shown, strict=True), s=9, color=color, label=label)
    upper.plot(
        *zip(*map(place, front), strict=True),
        color=BLUE,
        marker="o",
        markersize=3.5,
        linewidth=1.2,
        label="front",
    )
    star = "chosen" if searched.plan == chosen.plan else "best of these"
    upper.scatter(*place(chosen), marker="*", s=140, color=VERMILLION, zorder=3, label=star)
    figure.legend(loc="outside upper center", ncols=2)  # a point may lie anywhere in the axes
    _draw_decoding(lower, timed, chosen, noisy)
    for axes in (upper, lower):
        axes.set_ylabel("perplexity on calibration text,\nuntrained, without its slope")
    for axes in more:
        _draw_rebuilt(axes, searched, config, stored)
    for axes in (upper, *more):
        axes.set_xlabel(f"{unit} stored")
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if searched.factored is not None:
        more[0].set_xlabel(f"{unit} stored (bar: 95 % interval of the distance)")
    for axes in (upper, lower, *more):
        axes.set_axisbelow(True)
        axes.grid(color=GRID, linewidth=0.6)
    save(figure, path)


def _draw_decoding(axes: Axes, timed: Sequence[Timed], chosen: Point, noisy: bool) -> None:
    """Quality against the time of decoding a token, or against the bytes that it reads; a line
    where the quality is that of another text."""
    context = timed[0].context
    for item in timed:
        at = item.read / 1e6 if noisy else 1000 * item.decode.seconds
        if item.point is None:
            axes.axvline(at, color=GREEN, linewidth=1.2, linestyle=":", label=f"{BASIS}, see below")
            continue
        is_chosen = item.point == chosen
        width = 1000 * item.decode.seconds * item.decode.spread / item.decode.ratio
        axes.errorbar(
            at,
            math.exp(item.point.expected),
            xerr=0 if noisy else width,
            marker="*" if is_chosen else "o",
            markersize=11 if is_chosen else 4,
            color=VERMILLION if is_chosen else BLUE,
            linewidth=0.8,
        )
    if any(item.point is None for item in timed):
        axes.legend()
    axes.set_xlabel(
        f"MB read to decode a token after {context} others\n(too noisy here to time it)"
        if noisy
        else f"ms to decode a token after {context} others\n(fp32; bars: quartiles)"
    )


def _draw_rebuilt(
    axes: Axes,
    searched: AutoResult,
    config: LlamaConfig,
    stored: Callable[[SharingPlan], float],
) -> None:
    """Quality against bytes of the plans that were compared after reconstruction."""
    assert searched.base_rebuilt is not None
    factored = searched.factored
    shown = {c.plan: c.rebuilt for c in searched.candidates if c.rebuilt is not None}
    for plan, loss in shown.items():
        is_best = plan == searched.chosen.plan
        axes.scatter(
            stored(plan),
            math.exp(loss),
            marker="*" if is_best else "o",
            s=140 if is_best else 25,
            color=VERMILLION if is_best else BLUE,
        )
    if factored is not None:
        best = stored(searched.chosen.plan)
        at, low, high = (math.exp(factored.loss + rise) for rise in (0.0, *factored.above))
        axes.plot([best, best], [low, high], color=VERMILLION, linewidth=0.8)  # its 95 % interval
        label = f"{BASIS}{', chosen' if factored.taken else ''}"
        axes.scatter(stored(factored.plan), at, marker="P", s=70, color=GREEN, label=label)
    base = math.exp(searched.base_rebuilt)
    name = in_words(searched.base.plan, config)
    axes.axhline(base, color=MUTED, linewidth=0.8, linestyle="--", zorder=0, label=name)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    axes.set_ylabel("perplexity after reconstruction,\non its text")
