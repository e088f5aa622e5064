"""The rows of docs/methods.md as pictures, docs/methods*.svg: cost against bytes and cache saved.

python tests/benchmarks/method_picture.py
"""

from __future__ import annotations

import statistics

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from method_tables import BASES, Base, Line, above, controls_of, recipe_of, stored

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
    "basis": ("Basis Sharing (whole cache)", SKY, "P"),
    "ours": ("auto without bases, reconstructed", BLUE, "o"),
    "auto": ("auto, reconstructed", BLUE, "o"),
    "pruned-loss-distilled": ("removed by loss", ORANGE, "s"),
    "pruned-loss-int8": ("removed by loss, int8", ORANGE, "*"),
    "pruned-loss-int4": ("removed by loss, int4", ORANGE, "X"),
    "dropped-distilled": ("whole layers of attention", VERMILLION, "h"),
    "pruned-loss": ("removed by loss", ORANGE, "D"),
    "pruned-gradient": ("removed by gradient", GREEN, "p"),
    "pruned-magnitude": ("removed by magnitude", MUTED, "d"),
    "pruned-random": ("removed at random", MUTED, "v"),
    "random": ("tied at random", GREEN, "^"),
    "tied-loss-distilled": ("tied by loss", PURPLE, "<"),
    "cosine": ("tied by cosine", PURPLE, "<"),
    "postshare": ("PostShare as published", VERMILLION, "X"),
    "spans-loss-distilled": ("SA, followers by loss", GREEN, ">"),
    "spans-kv-distilled": ("CLA, followers by loss", SKY, "*"),
    "spans-late": ("SA, late layers", GREEN, "<"),
    "pooled": ("one KV head a layer", MUTED, "8"),
    "continued-int8": ("nothing shared, int8", BLUE, "s"),
    "continued-int4": ("nothing shared, int4", BLUE, "X"),
    "continued-cache-int8": ("nothing shared, cache in int8", BLUE, "*"),
}
"""Rows in the order of the legend: their label, colour and mark. Those without a teacher are drawn
with dashes and hollow marks."""

FAR_ABOVE = 100
"""Percent above *continued* from which on costs and savings are drawn by their logarithms."""

Points = dict[str, list[tuple[float, float]]]
"""Of every row, by what it saves: percent saved, and percent above *continued*."""


def saved(line: Line, counted: str) -> float:
    """Percent of the base's bytes or cache that a training saves."""
    if counted == "bytes":
        return 100 * (1 - stored(line["bytes"]) / line["bytes"]["base"])
    return 100 * (1 - line["cache"]["stored"] / line["cache"]["base"])


def points(
    name: str, lines: list[Line], controls: dict[int, float], counted: str
) -> list[tuple[float, float]]:
    """Of each size of a row that saves anything."""
    found = []
    for size in {line["size"] for line in lines if line["row"] == name}:
        of_size = [line for line in lines if (line["row"], line["size"]) == (name, size)]
        least = min(saved(line, counted) for line in of_size)
        found.append((least, statistics.fmean(above(of_size, controls))))
    return sorted(point for point in found if point[0] > 0)


def shown(base: Base) -> dict[str, Points]:
    """The points of every row that is shown and has been trained, by bytes, and by cache where the
    table has it."""
    rows, lines = base.rows(), base.read()
    controls = controls_of(lines, rows)
    trained = {line["row"] for line in lines}
    found: dict[str, Points] = {}
    for counted in ("bytes", "cache") if all("cache" in line for line in lines) else ("bytes",):
        of_rows = {
            name: points(name, lines, controls["distill" in recipe_of(rows, name)], counted)
            for name in SHOWN
            if name in trained
        }
        found[counted] = {name: of_row for name, of_row in of_rows.items() if of_row}
    return found


def described(base: Base) -> str:
    """What the file says of itself, by which a test finds a picture of other numbers."""
    return "; ".join(
        f"{name}, of the {counted}: "
        + ", ".join(f"{cost:z.2f} % at {percent:.2f} %" for percent, cost in of_row)
        for counted, of_rows in shown(base).items()
        for name, of_row in of_rows.items()
    )


@rc_context(FILE_STYLE)
def draw(base: Base) -> None:
    """Write the picture."""
    panels, rows = shown(base), base.rows()
    figure = Figure(figsize=(WIDTH, 6.0 if len(panels) == 1 else 8.0), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    costs = [cost for of in panels.values() for of_row in of.values() for _, cost in of_row]
    for axes, (counted, of_rows) in zip(every, panels.items(), strict=True):
        axes.axhline(0, color=MUTED, linewidth=0.8)
        for name, of_row in of_rows.items():
            label, color, mark = SHOWN[name]
            taught = "distill" in recipe_of(rows, name)
            axes.plot(
                *zip(*of_row, strict=True),
                mark + ("-" if taught else "--"),
                color=color,
                markerfacecolor=color if taught else "white",
                label=label,
                gid=name,
                markersize=6,
            )
        axes.set_xlabel(f"% of the {counted} saved")
        if max(costs, default=0) > FAR_ABOVE:
            axes.set_xscale("log")
            axes.set_xticks([2, 5, 10, 20, 50], minor=False)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:g}")
    every[0].set_ylabel("% of perplexity above its $\\it{continued}$")
    figure.suptitle(f"What sharing costs, {base.name}")
    drawn = {line.get_gid(): line for axes in every for line in axes.get_lines()}
    lines = [drawn[name] for name in SHOWN if name in drawn]
    if lines:
        labels = [str(line.get_label()) for line in lines]
        title = "hollow marks, dashes: without a teacher"
        figure.legend(lines, labels, loc="outside lower center", ncols=2, title=title)
    figure.savefig(base.picture, metadata={"Date": None, "Description": described(base)})


if __name__ == "__main__":
    for base in BASES.values():
        draw(base)
