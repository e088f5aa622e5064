"""The picture of a search: quality against what is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.figures import BLUE, FILE_STYLE, GRID, MUTED, SKY, SMALL, VERMILLION, WIDTH, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import LlamaConfig

    from train.auto_planning import Point
    from train.auto_report import Timed


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
    unit, factor = ("GB", 1e9) if whole >= 1e9 else ("MB", 1e6)
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
    points: Sequence[Point],
    front: Sequence[Point],
    chosen: Point,
    timed: Sequence[Timed],
    noisy: bool,
    config: LlamaConfig,
    size: int,
    path: Path,
    star: str = "chosen",
) -> None:
    """Quality against bytes, and against the time of decoding a token, as PNG and SVG.

    Args:
        points: everything that was measured.
        noisy: whether the times are worth nothing: then the bytes that a token reads are drawn.
        size: bytes of one exported parameter.
        star: what `chosen` is called.
    """
    figure = Figure(figsize=(WIDTH, 7.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharey=True)
    whole = front[0].plan.savings(config).bytes(size)[0]
    unit, factor = ("GB", 1e9) if whole >= 1e9 else ("MB", 1e6)

    def place(point: Point) -> tuple[float, float]:
        stored = point.plan.savings(config).bytes(size)[1]
        return stored / factor, math.exp(point.expected)

    # Far above the chosen plan nothing is to be read, and it would flatten the rest.
    bottom = math.exp(min(point.expected for point in front))
    span = math.exp(chosen.expected) - bottom + 0.01 * bottom
    upper.set_ylim(bottom - 0.2 * span, bottom + 3 * span)
    for name, color in (("search", MUTED), ("structure", SKY)):
        shown = [place(p) for p in points if (p.origin == "structure") == (name == "structure")]
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
    upper.scatter(*place(chosen), marker="*", s=140, color=VERMILLION, zorder=3, label=star)
    upper.set_xlabel(f"{unit} stored")
    figure.legend(loc="outside upper center", ncols=2)  # a point may lie anywhere in the axes
    _draw_decoding(lower, timed, chosen, noisy)
    for axes in (upper, lower):
        axes.set_ylabel("perplexity on calibration text,\nuntrained, without its slope")
        axes.grid(color=GRID, linewidth=0.6)
    save(figure, path)


def _draw_decoding(axes: Axes, timed: Sequence[Timed], chosen: Point, noisy: bool) -> None:
    """Quality against the time of decoding a token, or against the bytes that it reads."""
    context = timed[0].context
    for item in timed:
        is_chosen = item.point == chosen
        width = 1000 * item.decode.seconds * item.decode.spread / item.decode.ratio
        axes.errorbar(
            item.read / 1e6 if noisy else 1000 * item.decode.seconds,
            math.exp(item.point.expected),
            xerr=0 if noisy else width,
            marker="*" if is_chosen else "o",
            markersize=11 if is_chosen else 4,
            color=VERMILLION if is_chosen else BLUE,
            linewidth=0.8,
        )
    axes.set_xlabel(
        f"MB read to decode a token after {context} others\n(too noisy here to time it)"
        if noisy
        else f"ms to decode a token after {context} others, fp32 (bars: quartiles)"
    )
