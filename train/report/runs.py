"""Several runs: quality against bytes, curves overlaid, tables side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.common.figure_style import GRID, MUTED, SERIES, color_and_mark
from train.common.pareto import pareto
from train.evaluation.figures import NOT_MEASURED
from train.evaluation.summary import bytes_of
from train.report.data import RunData, Training
from train.report.plots import SIZE, draw_curve, draw_trend
from train.report.rivals import find_rivals
from train.report.svg import Picture, render
from train.report.tables import Table
from train.report.verdict import difference, judge, spread

LINES = ("-", "--", ":", "-.")
CURVES = (
    ("lm_loss", "Language-model loss", "nats per token"),
    ("validation_loss", "Validation loss", "nats per token"),
    ("penalty", "Penalty", "penalty"),
    ("pair_distance_mean", "Mean distance of the tied pairs", "distance"),
    ("tokens_per_second", "Throughput", "tokens/s"),
)
JUMPING = ("lm_loss", "tokens_per_second")
FIGURES = ("weight bytes", "cache bytes per token", "decode time")
IGNORED = ("name", "output_dir", "resume", "wandb")
"""Sections of a recipe that change no number."""


@dataclass(frozen=True)
class Named:
    """A run, and what it is called here: as short as tells it from the others."""

    label: str
    data: RunData

    @property
    def summary(self) -> dict[str, Any] | None:
        return self.data.summary

    @property
    def quality(self) -> float | None:
        """Perplexity of what the run ships."""
        if self.summary is None:
            return None
        values = self.summary["perplexity"]
        return values["direct"] if values["post"] is None else values["post"]

    @property
    def training(self) -> Training | None:
        """Post-training, or of a run that only heals its healing."""
        return self.data.trainings.get("post") or self.data.trainings.get("heal")

    @property
    def bytes(self) -> int | None:
        return None if self.summary is None else bytes_of(self.summary, "post")


def named(runs: Sequence[RunData]) -> list[Named]:
    """The folders without what all their paths begin with."""
    paths = [run.folder.resolve() for run in runs]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [
        Named(path.relative_to(common).as_posix(), run)
        for path, run in zip(paths, runs, strict=True)
    ]


def mismatch(runs: Sequence[Named]) -> str | None:
    """Why the perplexities of these runs may not be compared; None when they may."""
    blocks = {run.label: run.data.blocks["base"] for run in runs if "base" in run.data.blocks}
    labels = [run.label for run in runs if run.quality is not None]
    if set(labels) - blocks.keys():
        without = ", ".join(sorted(set(labels) - blocks.keys()))
        return f"{without}: no evaluation-blocks.json tells whether the held-out text is the same"
    if not labels:
        return None
    first = blocks[labels[0]]
    for label in labels[1:]:
        other = blocks[label]
        if other.tokens != first.tokens or not np.allclose(other.nats, first.nats, rtol=1e-4):
            return (
                f"{labels[0]} and {label} have other bases or other held-out text: their "
                "perplexities cannot be compared"
            )
    return None


# --- pictures -------------------------------------------------------------------------------------


def pictures(runs: Sequence[Named]) -> Iterator[Picture]:
    """Quality against bytes first, then each curve that any of the runs has."""
    points = [run for run in runs if run.quality is not None and run.bytes is not None]
    if points:
        yield Picture(
            "Quality against bytes",
            render(quality_against_bytes, points),
            "Perplexity against megabytes of weights, one point for each run",
            "The line is the Pareto front: no other point is better in both.",
            wide=True,
        )
    for key, title, unit in CURVES:
        drawn = [run for run in runs if run.training is not None and run.training.has(key)]
        if drawn:
            yield Picture(
                title,
                render(_overlay, runs, key, unit),
                f"{title} against steps of {', '.join(run.label for run in drawn)}",
            )


def _overlay(runs: Sequence[Named], key: str, unit: str) -> Figure:
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.2 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    for index, run in enumerate(runs):  # a run keeps its colour where another one is missing
        post = run.training
        if post is not None and post.has(key):
            color, line = SERIES[index % len(SERIES)], LINES[index // len(SERIES) % len(LINES)]
            if key in JUMPING:
                draw_trend(axes, post.steps, post.columns[key], color, run.label, line)
            else:
                draw_curve(axes, post, key, color, run.label, linestyle=line)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    figure.legend(loc="outside lower left")
    return figure


def quality_against_bytes(runs: Sequence[Named]) -> Figure:
    """Points of runs that have both, the base and *continued* of the first, and the front."""
    marks = [(run.bytes, run.quality, run.label) for run in runs]
    first = runs[0].summary
    assert first is not None
    for name in ("base", "continued"):
        if first["perplexity"][name] is not None and first["bytes"]["base"] is not None:
            marks.append((first["bytes"]["base"], first["perplexity"][name], name))
    return draw_marks([((size or 0) / 1e6, value or 0.0, label) for size, value, label in marks])


def draw_marks(marks: Sequence[tuple[float, float, str]]) -> Figure:
    """(megabytes, perplexity, label), with the Pareto front."""
    figure = Figure(figsize=(6.2, 4.0 + 0.1 * len(marks)), layout="constrained")
    axes = figure.add_subplot()
    points = np.array([mark[:2] for mark in marks], dtype=np.float64)
    front = points[pareto(points)]
    axes.step(front[:, 0], front[:, 1], where="post", color=MUTED, linewidth=1.2)
    for index, (size, value, label) in enumerate(marks):
        color, shape = color_and_mark(index)
        axes.plot(size, value, shape, markersize=8, color=color, label=label)
    axes.margins(x=0.08, y=0.08)
    axes.grid(color=GRID)
    axes.set_xlabel("megabytes of weights")
    axes.set_ylabel("perplexity on held-out text")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# --- tables ---------------------------------------------------------------------------------------


def side_by_side(runs: Sequence[Named]) -> Table:
    """One row for each run."""
    columns = ("run", "perplexity", "vs its continued", "95 %", *FIGURES, "verdict")
    rows = tuple((run.label, *_cells(run)) for run in runs)
    note = "Figures are against stock; each run's own report has the rule of the verdict."
    return Table("Side by side", columns, rows, note)


def _cells(run: Named) -> tuple[str, ...]:
    summary = run.summary
    figures = run.data.figures
    if summary is None or run.quality is None or figures is None:
        return ("not evaluated", *[""] * 6)
    shipped = "direct" if summary["perplexity"]["post"] is None else "post"
    control = summary["perplexity"]["continued"]
    bounds = difference(run.data, shipped, "continued")
    judged = judge(run.data, find_rivals(run.data.folder, run.data.recipe)[0])
    decode = figures.decode
    cache = figures.cache_bytes / figures.stock_cache_bytes
    return (
        f"{run.quality:.2f}",
        f"{run.quality / control - 1:+.1%}" if control else "",
        spread(bounds) if bounds else "",
        f"{figures.weight_bytes:,} ({figures.weight_ratio - 1:+.1%})",
        "as stock" if cache == 1 else f"{figures.cache_bytes:,} ({cache - 1:+.1%})",
        NOT_MEASURED if decode is None else f"{decode.ratio - 1:+.1%}",
        "" if judged is None else judged.decision.chip,
    )


def recipe_differences(runs: Sequence[Named]) -> Table | None:
    """The keys whose values are not the same in all recipes."""
    flat = {run.label: _flat(run.data) for run in runs if run.data.recipe is not None}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [key for key in keys if len({v.get(key, "") for v in flat.values()}) > 1]
    if len(flat) < 2 or not differing:
        return None
    rows = tuple((key, *(values.get(key, "") for values in flat.values())) for key in differing)
    return Table("What differs in the recipes", ("key", *flat), rows, plain=True)


def _flat(data: RunData) -> dict[str, str]:
    assert data.recipe is not None
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        else:
            found[path] = "null" if value is None else str(value)

    walk(data.recipe.model_dump(mode="json", exclude=set(IGNORED)), "")
    return found
