"""Pictures that are made but not rendered: two thirds of a short run are matplotlib's rendering."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG

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
def unrendered() -> Iterator[None]:
    """Inside, figures are made as always, and their files hold a pixel or nothing."""
    with (
        patch.object(FigureCanvasAgg, "print_png", _writes(PIXEL)),
        patch.object(FigureCanvasSVG, "print_svg", _writes(DRAWING)),
    ):
        yield


@contextmanager
def rendered() -> Iterator[None]:
    """Inside `unrendered`: real files again."""
    with (
        patch.object(FigureCanvasAgg, "print_png", _PNG),
        patch.object(FigureCanvasSVG, "print_svg", _SVG),
    ):
        yield
