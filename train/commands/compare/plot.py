"""The picture of `postshare compare`: quality against bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from train.commands.compare.results import Entry
from train.common.figure_style import DARK_GREY, FILE_STYLE, MUTED, WIDTH, color_and_mark, save
from train.common.pareto import pareto
from train.evaluation.bootstrap import interval


@rc_context(FILE_STYLE)
def save_picture(entries: Sequence[Entry], reference: str, path: Path) -> None:
    """Quality against bytes and the Pareto front, as PNG and SVG.

    Bars are 95 % intervals of the difference from the entry named `reference`.
    """
    against = next(entry for entry in entries if entry.name == reference)
    sized = [entry for entry in entries if entry.bytes is not None]
    points = np.array([[(entry.bytes or 0) / 1e6, entry.perplexity] for entry in sized])
    figure = Figure(figsize=(WIDTH, 4.3 + 0.1 * len(sized)), layout="constrained")
    axes = figure.add_subplot()
    front = points[pareto(points)]
    axes.step(front[:, 0], front[:, 1], where="post", color=MUTED, linewidth=1.2, label="Pareto")
    for index, (entry, (size, value)) in enumerate(zip(sized, points, strict=True)):
        if entry is not against:
            apart = interval(entry.losses, against.losses)
            low, high = (math.exp(against.loss + bound) for bound in apart)
            axes.plot([size, size], [low, high], color=DARK_GREY, linewidth=1.4, zorder=2)
        color, mark = color_and_mark(index)
        axes.plot(size, value, mark, color=color, markersize=7, zorder=3, label=entry.name)
    axes.margins(x=0.08, y=0.08)
    axes.set_xlabel("megabytes of weights")
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title(f"Quality against bytes at equal tokens\n(bars: 95 % against {reference})")
    figure.legend(loc="outside lower center", ncols=3)  # models of one size lie side by side
    save(figure, path)
