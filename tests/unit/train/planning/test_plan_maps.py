"""Pictures as files: what every one of them must be, read back from what was written."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from sa_models.plan import AttentionSpan, HeadTie, SharingPlan
from sa_models.scores.attention_maps import Isotropy
from tests.support.report_run import GQA, losses
from train.commands.compare.plot import save_picture
from train.commands.compare.results import Entry
from train.common.figure_style import DIVERGING, SEQUENTIAL, SERIES
from train.planning.plan_maps import save_isotropy, save_similarity, save_ties
from train.planning.search.front_plot import save_pareto

THUMBNAIL = 320
"""Pixels."""


def draw_all(folder: Path) -> None:
    folder.mkdir()
    layout = SharingPlan().layout(GQA)
    plan = SharingPlan(
        ties=(HeadTie((2, 1), (0, 1), ("v", "o")),),
        removed=((1, 0),),
        spans=(AttentionSpan(0, (1,)),),
    )
    save_similarity(torch.linspace(-1, 1, 36).view(6, 6), layout, "qkvo_aligned", folder / "s.png")
    save_ties(plan, layout, folder / "t.png")
    maps = torch.full((8, 8), 0.25, dtype=torch.float64)
    save_isotropy(Isotropy(maps, maps), [AttentionSpan(2, (3,))], folder / "i.png")
    save_pareto([0, 10, 30], [3.0, 3.1, 3.5], 100, 2, folder / "p.png")
    entries = [
        Entry(name, "", (losses(above),), 90, size)
        for name, above, size in (("continued", 0.0, 200), ("random-pairs", 0.3, 150))
    ]
    save_picture(entries, "continued", folder / "c.png")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "first"
    draw_all(folder)
    return folder


def test_every_picture_is_a_png_and_an_svg_and_the_same_each_time(
    drawn: Path, tmp_path: Path
) -> None:
    draw_all(tmp_path / "second")
    first = {file.name: file.read_bytes() for file in drawn.iterdir()}
    assert set(first) == {f"{name}.{kind}" for name in "sticp" for kind in ("png", "svg")}
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "second").iterdir()}
    assert all(c.startswith(b"\x89PNG") for n, c in first.items() if n.endswith("png"))


@pytest.mark.parametrize("name", "sticp")
def test_all_text_is_legible_where_a_picture_is_320_pixels_wide(drawn: Path, name: str) -> None:
    root = ElementTree.parse(drawn / f"{name}.svg").getroot()
    width = float(root.attrib["viewBox"].split()[2])
    pixels = []
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        (size,) = re.findall(r"([\d.]+)px", text.attrib["style"])
        pixels.append(float(size) * THUMBNAIL / width)
    assert len(pixels) > 5
    assert min(pixels) >= 8


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
COLOUR_BLINDNESS = {
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [
        [0.3673, 0.8606, -0.2280],
        [0.2802, 0.6726, 0.0472],
        [-0.0118, 0.0430, 0.9688],
    ],
}


def lab(color: str | tuple[float, ...], seen_with: str) -> np.ndarray:
    """CIELAB (D65) of a colour as the colour-blind see it."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(COLOUR_BLINDNESS[seen_with]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", COLOUR_BLINDNESS)
def test_the_colour_blind_tell_the_colours_apart(kind: str) -> None:
    for one, other in itertools.combinations(SERIES, 2):
        assert np.linalg.norm(lab(one, kind) - lab(other, kind)) > 10, (one, other)
    red_and_green = np.linalg.norm(lab("#d62728", kind) - lab("#2ca02c", kind))
    ours = min(
        float(np.linalg.norm(lab(colormaps[DIVERGING](0.15), kind) - lab(other, kind)))
        for other in (colormaps[DIVERGING](0.5), colormaps[DIVERGING](0.85))
    )
    assert ours > red_and_green
    rising = [lab(colormaps[SEQUENTIAL](at), kind)[0] for at in np.linspace(0, 1, 32)]
    assert np.all(np.diff(rising) > 0)
