"""The picture of `postshare compare`: quality against bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from train.comparison import Entry, pareto
from train.figures import DARK_GREY, FILE_STYLE, MUTED, SERIES, SMALL, WIDTH, save
from train.intervals import interval


@rc_context(FILE_STYLE)
def save_picture(entries: Sequence[Entry], reference: str, path: Path) -> None:
    """Quality against bytes and the Pareto front, as PNG and SVG.

    Bars are 95 % intervals of the difference from the entry named `reference`.
    """
    against = next(entry for entry in entries if entry.name == reference)
    sized = [entry for entry in entries if entry.bytes is not None]
    points = np.array([[(entry.bytes or 0) / 1e6, entry.perplexity] for entry in sized])
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.add_subplot()
    front = points[pareto(points)]
    axes.step(front[:, 0], front[:, 1], where="post", color=MUTED, linewidth=1.2, label="Pareto")
    colors = itertools.cycle(SERIES)
    for entry, (size, value), color in zip(sized, points, colors, strict=False):
        if entry is not against:
            apart = interval(entry.losses, against.losses)
            low, high = (math.exp(against.loss + bound) for bound in apart)
            axes.plot([size, size], [low, high], color=DARK_GREY, linewidth=1.4, zorder=2)
        axes.plot(size, value, color=color, marker="o", markersize=7, zorder=3)
        axes.annotate(
            entry.name, (size, value), xytext=(7, 4), textcoords="offset points", size=SMALL
        )
    axes.margins(x=0.16, y=0.12)
    axes.set_xlabel("megabytes of weights")
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title(f"Quality against bytes at equal tokens\n(bars: 95 % against {reference})")
    axes.legend()
    save(figure, path)
