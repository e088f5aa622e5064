"""The picture of a search: quality against what is stored."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_pareto(
    removed: Sequence[int], losses: Sequence[float], parameters: int, size: int, path: Path
) -> None:
    """Perplexity on calibration text against parameters removed, along the path, as a PNG.

    Args:
        removed: parameters that are no longer stored, 0 first.
        losses: nats per token, of the dense model first.
        parameters: of the dense model.
        size: bytes of one parameter.
    """
    figure = Figure(figsize=(6.4, 4.4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    shares = [100 * count / parameters for count in removed]
    perplexities = [math.exp(loss) for loss in losses]
    axes.plot(shares, perplexities, color="#0072b2", marker="o", markersize=3.5, linewidth=1.2)
    axes.axhline(perplexities[0], color="#999999", linewidth=0.8, linestyle="--", zorder=0)
    axes.annotate("dense", (shares[-1], perplexities[0]), ha="right", va="bottom", size=8)
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
    above.set_xlabel(f"{unit} stored")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_title(
        f"{perplexities[0]:.2f} to {perplexities[-1]:.2f} at {shares[-1]:.1f} %", size=10
    )
    beside = path.with_name(path.name + ".tmp")
    FigureCanvasAgg(figure).print_png(str(beside))
    os.replace(beside, path)
