"""The style of pictures, and their files: one palette, one size of text, PNG and SVG.

Text stays readable where a picture is shown 320 pixels wide, as thumbnails and phones do: at
:data:`WIDTH` inches, :data:`SMALL` points are 8 pixels then.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sa_models.atomic_files import new_file

INK, GRID, MUTED = "#1f2328", "#d8dee4", "#6e7781"
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY = "#cc79a7", "#56b4e9"
SERIES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
"""Okabe and Ito's palette, which the colour-blind tell apart."""
MARKS = ("o", "s", "^", "v", "P", "X", "d", "p")
PALE, DARK_GREY = "#d9d9d9", "#444444"
DIVERGING, SEQUENTIAL = "PuOr_r", "viridis"
"""Colour maps, of values on both sides of 0 and of others; the colour-blind tell both apart."""

WIDTH = 5.6
"""Inches, of every picture that is written to a file."""
TEXT, SMALL = 11.0, 10.2

TEXT_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "postshare",  # the same run gives the same bytes
}
FILE_STYLE: Any = {
    **TEXT_STYLE,
    "figure.dpi": 180,
    "savefig.dpi": "figure",
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "figure.titlesize": TEXT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
}


def color_and_mark(index: int) -> tuple[str, str]:
    """Of a point among others: no two of the first 24 have both in common."""
    return SERIES[index % len(SERIES)], MARKS[index % len(MARKS)]


def save(figure: Figure, path: Path) -> None:
    """Write a picture as `path`, a PNG, and as an SVG beside it, each whole or not at all.

    The same figure gives the same bytes. Called within ``matplotlib.rc_context(FILE_STYLE)``, in
    which it was drawn.
    """
    image, drawing = io.BytesIO(), io.StringIO()
    FigureCanvasAgg(figure).print_png(image)
    FigureCanvasSVG(figure).print_svg(drawing, metadata={"Date": None})
    vector = path.with_suffix(".svg")
    for file, content in ((path, image.getvalue()), (vector, drawing.getvalue().encode())):
        with new_file(file) as beside:
            beside.write_bytes(content)
