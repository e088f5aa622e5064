"""Figures as SVG images that follow the page: dark where the reader's system is dark.

Each is an image of its own (a data URI), with its colours as CSS variables: nothing of one picture
can reach into another or into the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from train.common.figure_style import (
    BLUE,
    DARK_GREY,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    TEXT_STYLE,
    VERMILLION,
)

# Colour in the figure: the same on a dark page.
DARK = {
    INK: "#e6edf3",
    GRID: "#30363d",
    MUTED: "#9aa4ae",
    BLUE: "#58aee6",
    ORANGE: "#f0b53c",
    GREEN: "#2cc295",
    VERMILLION: "#ff8a4c",
    PURPLE: "#e3a3c6",
    SKY: "#7cc7f2",
    PALE: "#3d444d",
    DARK_GREY: "#adbac7",
}

STYLE: Any = {
    **TEXT_STYLE,
    "font.size": 10.5,
    "axes.titlesize": 11.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Picture:
    """An image of the report.

    Attributes:
        uri: data URI.
        alt: what it shows, for those who do not see it.
        note: a sentence below it.
        wide: it takes the whole width.
    """

    title: str
    uri: str
    alt: str
    note: str = ""
    wide: bool = False


def render(draw: Callable[..., Figure], *arguments: Any) -> str:
    """The data URI of the figure that ``draw(*arguments)`` makes, in the style of the report."""
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        FigureCanvasSVG(draw(*arguments)).print_svg(buffer, metadata={"Date": None})
    return data_uri(themed(buffer.getvalue()).encode(), "image/svg+xml")


def themed(svg: str) -> str:
    """The SVG with its colours as variables, which are others on a dark page."""
    light, dark = [], []
    for color, other in DARK.items():
        name = f"--c{color[1:]}"
        svg = svg.replace(color, f"var({name})")
        light.append(f"{name}:{color}")
        dark.append(f"{name}:{other}")
    rules = (
        f":root{{{';'.join(light)}}}@media (prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}"
    )
    return svg.replace("<defs>", f"<style>{rules}</style><defs>", 1)


def themed_file(svg: str) -> str:
    """As :func:`themed`, of a picture drawn on white paper with black text and axes."""
    svg = svg.replace('style="fill: #ffffff"', 'style="fill: none"').replace("#000000", INK)
    # Black text has no colour of its own in the file.
    return themed(svg).replace("<style>", f"<style>text{{fill:var(--c{INK[1:]})}}", 1)


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
