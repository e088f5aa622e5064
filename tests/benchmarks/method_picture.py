"""The rows of docs/methods.md as pictures, docs/methods*.svg: cost against bytes saved.

python tests/benchmarks/method_picture.py
"""

from __future__ import annotations

import statistics

from matplotlib import rc_context
from matplotlib.figure import Figure
from method_tables import BASES, Base, Line, above, controls_of, stored

from train.common.figure_style import (
    BLUE,
    FILE_STYLE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
)

SHOWN = {
    "basis": ("Basis Sharing (whole cache), with a teacher", SKY, "P-"),
    "ours": ("auto without bases, reconstructed, with a teacher", BLUE, "o-"),
    "pruned-loss-distilled": ("removed by loss, with a teacher", ORANGE, "s-"),
    "dropped-distilled": ("whole layers of attention, with a teacher", BLUE, "h-"),
    "pruned-loss": ("removed by loss, without a teacher", ORANGE, "D--"),
    "pruned-gradient": ("removed by gradient, without a teacher", GREEN, "p--"),
    "pruned-magnitude": ("removed by magnitude, without a teacher", MUTED, "d--"),
    "pruned-random": ("removed at random, without a teacher", MUTED, "v--"),
    "random": ("tied at random, without a teacher", GREEN, "^--"),
    "cosine": ("tied by cosine, without a teacher", PURPLE, "<--"),
    "postshare": ("PostShare as published, without a teacher", VERMILLION, "X--"),
}
"""Rows in the order of the legend: their label, colour and mark. Without a teacher: dashes, and
hollow marks."""

FAR_ABOVE = 100
"""Percent above *continued* from which on costs are drawn by their logarithms."""


def points(name: str, lines: list[Line], controls: dict[int, float]) -> list[tuple[float, float]]:
    """Of each size, by bytes: percent of the bytes saved, and percent above *continued*."""
    found = []
    for size in {line["size"] for line in lines if line["row"] == name}:
        of_size = [line for line in lines if (line["row"], line["size"]) == (name, size)]
        base = of_size[0]["bytes"]["base"]
        saved = 100 * (1 - max(stored(line["bytes"]) for line in of_size) / base)
        found.append((saved, statistics.fmean(above(of_size, controls))))
    return sorted(found)


def shown(base: Base) -> dict[str, list[tuple[float, float]]]:
    """The points of every row that is shown and has been trained."""
    rows, lines = base.rows(), base.read()
    controls = controls_of(lines, rows)
    trained = {line["row"] for line in lines}
    return {
        name: points(name, lines, controls["distill" in rows[name]["recipe"]])
        for name in SHOWN
        if name in trained
    }


def described(base: Base) -> str:
    """What the file says of itself, by which a test finds a picture of other numbers."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{cost:z.2f} % at {saved:.2f} %" for saved, cost in of_row)
        for name, of_row in shown(base).items()
    )


@rc_context(FILE_STYLE)
def draw(base: Base) -> None:
    """Write the picture."""
    of_rows = shown(base)
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=MUTED, linewidth=0.8)
    for name, of_row in of_rows.items():
        label, color, style = SHOWN[name]
        taught = not style.endswith("--")
        axes.plot(
            *zip(*of_row, strict=True),
            style,
            color=color,
            markerfacecolor=color if taught else "white",
            label=label,
            markersize=6,
        )
    axes.set_xlabel("% of the bytes saved")
    axes.set_ylabel("% of perplexity above its $\\it{continued}$")
    axes.set_title(f"What sharing costs, {base.name}")
    costs = [cost for of_row in of_rows.values() for _, cost in of_row]
    if max(costs, default=0) > FAR_ABOVE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    if of_rows:
        figure.legend(loc="outside lower center")
    figure.savefig(base.picture, metadata={"Date": None, "Description": described(base)})


if __name__ == "__main__":
    for base in BASES.values():
        draw(base)
