"""Outputs of a run, sketched: pictures not rendered, few tokens of samples and of timings.

Rendering is two thirds of a short run, samples are a seventh of the rest; timings of decoding are a
third of a short search.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG

from train.evaluation import decode_time
from train.models import samples

_PNG, _SVG = FigureCanvasAgg.print_png, FigureCanvasSVG.print_svg
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg"><defs></defs></svg>'


def _writes(content: Any) -> Callable[..., None]:
    def write(canvas: Any, file: Any, **options: Any) -> None:
        file.write(content)

    return write


@contextmanager
def sketched() -> Iterator[None]:
    """Inside, files of figures hold a pixel or nothing, models add 4 tokens to a passage, and plans
    are timed with 5."""
    with (
        patch.object(samples, "ADDED", 4),
        patch.object(decode_time, "ROUNDS", (5, 5)),
        patch.object(FigureCanvasAgg, "print_png", _writes(PIXEL)),
        patch.object(FigureCanvasSVG, "print_svg", _writes(DRAWING)),
    ):
        yield


@contextmanager
def rendered() -> Iterator[None]:
    """Inside `sketched`: real pictures again."""
    with (
        patch.object(FigureCanvasAgg, "print_png", _PNG),
        patch.object(FigureCanvasSVG, "print_svg", _SVG),
    ):
        yield
