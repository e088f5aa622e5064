"""The pictures of one run; each is left out where the run has nothing to draw it from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sa_models.heads import HeadLayout
from train.common.figure_style import (
    BLUE,
    DIVERGING,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALE,
    SKY,
    VERMILLION,
)
from train.common.run_files import PARETO_PICTURE, SIMILARITY_PICTURE
from train.planning.plan_maps import draw_basis_map, draw_isotropy, draw_plan_map
from train.report.curves import shorten, trend
from train.report.data import Pairs, RunData, Training
from train.report.svg import Picture, data_uri, render, themed_file

COLORS = {"continued": MUTED, "post": BLUE, "heal": ORANGE}
SIZE = (5.4, 3.3)
"""Inches: text stays readable where a phone shows the picture at two thirds of this."""


def training_pictures(data: RunData, names: Mapping[str, str]) -> Iterator[Picture]:
    """Losses, penalty, distances.

    Args:
        names: of the trainings, for legends.
    """
    if not data.trainings:
        return
    validated = any(training.has("validation_loss") for training in data.trainings.values())
    yield Picture(
        "Language-model loss",
        render(_losses, data.trainings, names),
        f"Loss in nats per token of {', '.join(names[t] for t in data.trainings)} against steps",
        "Running means over a twelfth of the training"
        + (", the control as a broad band." if "continued" in data.trainings else ".")
        + (" Points: validation." if validated else ""),
    )
    post = data.trainings.get("post")
    # Healing reads the batches from the first on: beside a post-training, others than the control.
    own, control = post or data.trainings.get("heal"), data.trainings.get("continued")
    if own is not None and control is not None:
        yield Picture(
            "Loss above continued",
            render(_above, own, control),
            f"Difference of the losses of {names[own.name]} and continued, step by step",
            "Step by step on the same batch. Thick: the running mean.",
        )
    if post is not None and post.has("penalty"):
        yield Picture(
            "Penalty",
            render(_penalty, post),
            "Penalty against steps",
            "Before its weight in the total loss.",
        )
    if data.pairs is not None:
        yield Picture(
            "Distances of the tied pairs",
            render(_distances, data.pairs, post),
            "Distance between the two units of each pair against steps",
            f"{_pulled(data.pairs)} trajectories: each pair and projection that is pulled.",
        )


def system_pictures(data: RunData, names: Mapping[str, str]) -> Iterator[Picture]:
    """Throughput and memory of the trainings."""
    if data.trainings:
        yield Picture(
            "Throughput and memory",
            render(_systems, data.trainings, names),
            "Tokens per second and peak memory against steps",
        )


def plan_pictures(data: RunData) -> Iterator[Picture]:
    """The plan, similarity, isotropy, and what single changes cost."""
    plan, layout = data.plan, data.layout
    if plan is not None and layout is not None and (plan.ties or plan.removed or plan.spans):
        yield Picture(
            "The plan",
            render(draw_plan_map, plan, layout, 0.4),
            f"Map of {layout.layers} layers and {layout.units} units: ties, removed units, spans",
            "An arrow leads from the source to the target that takes its weights."
            if plan.ties
            else "",
        )
    elif plan is not None and layout is not None and plan.basis is not None:
        yield Picture(
            "The plan",
            render(draw_basis_map, plan.basis, layout),
            f"Map of {layout.layers} layers and their projections: which share a basis, its rank",
            "A block is one basis and the coefficients of its layers.",
        )
    if (uri := drawn(data.folder / SIMILARITY_PICTURE)) is not None:
        yield Picture(
            "Similarity of heads",
            uri,
            "Heat map of the scores between all units, by which pairs were chosen",
            data.chance["line"] if data.chance else "",
        )
    if data.spans is not None:
        yield from _span_pictures(data, data.spans)
    if data.search is not None and layout is not None:
        yield Picture(
            "What each change costs alone",
            render(_unit_costs, data.search, layout),
            "Heat map of layers and units: rise of the calibration loss by a single change",
            "Rise of the loss on calibration text (nats per token) when only this unit is changed, "
            "untrained; of the units that the plan changes.",
        )
    if (uri := drawn(data.folder / PARETO_PICTURE)) is not None:
        yield Picture(
            "Along the search",
            uri,
            "Perplexity on calibration text against what is stored",
        )


def _span_pictures(data: RunData, spans: dict[str, Any]) -> Iterator[Picture]:
    for key, title in (
        ("maps", "Isotropy of layers"),
        ("without_sink", "Isotropy without the first token"),
    ):
        values = torch.tensor(_matrix(spans["isotropy"].get(key)))
        if values.ndim == 2 and len(values):
            yield Picture(
                title,
                render(_isotropy, values, data),
                f"Heat map of {len(values)} layers: mean cosine of their attention maps",
                "Mean cosine of the rows of two layers' attention maps; spans are outlined.",
            )
    if costs := _layer_costs(spans):
        yield Picture(
            "What each layer costs as a follower",
            render(_bars, costs),
            "Bars by layer: rise of the calibration loss when the layer follows the one below",
            "Rise of the loss on calibration text (nats per token), untrained, when this layer "
            "alone reuses the layer below it.",
        )


# --- trainings ------------------------------------------------------------------------------------


def _losses(trainings: Mapping[str, Training], names: Mapping[str, str]) -> Figure:
    """Trends alone, the control broad and below: batch by batch the curves jump together."""
    figure, axes = _axes("step", "nats per token")
    for name, training in trainings.items():
        offset, broad = _offset(trainings, name), name == "continued"
        curve = shorten(training.steps + offset, training.columns["lm_loss"])
        axes.plot(
            curve.x,
            trend(curve.mean),
            color=COLORS[name],
            label=names[name],
            linewidth=6 if broad else 1.8,
            alpha=0.45 if broad else 1,
        )
        if training.has("validation_loss"):
            seen = np.isfinite(training.columns["validation_loss"])
            axes.plot(
                training.steps[seen] + offset,
                training.columns["validation_loss"][seen],
                color=COLORS[name],
                marker="o",
                markersize=4,
                linewidth=0.8,
                linestyle=":",
            )
    axes.legend()
    return figure


def _above(own: Training, control: Training) -> Figure:
    figure, axes = _axes("step", "nats per token")
    steps, ours, theirs = np.intersect1d(own.steps, control.steps, return_indices=True)
    difference = own.columns["lm_loss"][ours] - control.columns["lm_loss"][theirs]
    draw_trend(axes, steps, difference, BLUE, None)
    axes.axhline(0, color=MUTED, linewidth=1)
    return figure


def draw_trend(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    color: str,
    label: str | None,
    linestyle: str = "-",
) -> None:
    """A curve that jumps from batch to batch: thin as it is, thick its running mean."""
    curve = shorten(x, y)
    axes.plot(curve.x, curve.mean, color=color, linewidth=0.6, alpha=0.45)
    axes.plot(
        curve.x, trend(curve.mean), color=color, label=label, linestyle=linestyle, linewidth=2.2
    )


def draw_curve(
    axes: Axes,
    training: Training,
    key: str,
    color: str,
    label: str | None,
    offset: float = 0,
    linestyle: str = "-",
    factor: float = 1.0,
) -> None:
    """Mean and range of a column of metrics.jsonl against steps."""
    curve = shorten(training.steps + offset, training.columns[key] * factor)
    axes.plot(curve.x, curve.mean, color=color, label=label, linestyle=linestyle)
    if not np.array_equal(curve.low, curve.high):
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)


def _penalty(post: Training) -> Figure:
    figure, axes = _axes("step", "penalty")
    draw_curve(axes, post, "penalty", BLUE, None)
    axes.set_ylim(bottom=0)
    return figure


def _distances(pairs: Pairs, post: Training | None) -> Figure:
    figure, axes = _axes("step", "distance")
    flat = pairs.distance.reshape(len(pairs.steps), -1)
    flat = flat[:, np.isfinite(flat).all(axis=0)]
    if flat.shape[1] == 0:
        return figure
    if flat.shape[1] <= 60:
        axes.plot(pairs.steps, flat, color=SKY, linewidth=0.6, alpha=0.6)
    else:
        low, high = np.quantile(flat, [0.1, 0.9], axis=1)
        axes.fill_between(
            pairs.steps, low, high, color=SKY, alpha=0.35, linewidth=0, label="10 to 90 %"
        )
    axes.plot(pairs.steps, np.median(flat, axis=1), color=BLUE, label="median")
    if post is not None and post.has("pair_distance_worst"):
        worst = shorten(post.steps, post.columns["pair_distance_worst"])
        axes.plot(worst.x, worst.high, color=VERMILLION, label="farthest", linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _systems(trainings: Mapping[str, Training], names: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(SIZE[0], 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, training in trainings.items():
        offset, color = _offset(trainings, name), COLORS[name]
        if training.has("tokens_per_second"):
            draw_curve(above, training, "tokens_per_second", color, names[name], offset)
        key = "memory_bytes_max" if training.has("memory_bytes_max") else "memory_bytes"
        if training.has(key):
            draw_curve(below, training, key, color, names[name], offset, factor=2**-30)
    above.set_ylabel("tokens/s")
    above.set_ylim(bottom=0)
    below.set_ylabel("peak memory, GiB")
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    if above.get_legend_handles_labels()[1]:
        above.legend()
    return figure


def _offset(trainings: Mapping[str, Training], name: str) -> float:
    """Healing goes on where the post-training has ended."""
    post = trainings.get("post")
    return float(post.steps[-1]) if name == "heal" and post is not None else 0.0


def _pulled(pairs: Pairs) -> int:
    return int(np.isfinite(pairs.distance).all(axis=0).sum())


# --- the plan -------------------------------------------------------------------------------------


def _isotropy(values: torch.Tensor, data: RunData) -> Figure:
    figure = Figure(figsize=(5.0, 4.3), layout="constrained")
    axes = figure.add_subplot()
    image = draw_isotropy(axes, values, data.plan.spans if data.plan else ())
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, shrink=0.85)
    return figure


def _unit_costs(search: dict[str, Any], layout: HeadLayout) -> Figure:
    """Only units that the plan changes were measured one by one, or with their whole layer."""
    values = np.full((layout.layers, layout.units), np.nan)
    for rise in search["loss_rises"]:
        if rise["loss_rise"] is not None:
            layer, unit = rise["target"]
            values[layer, slice(None) if unit is None else unit] = rise["loss_rise"]
    figure = Figure(figsize=(5.0, 4.3), layout="constrained")
    axes = figure.add_subplot()
    finite = values[np.isfinite(values)]
    limit = float(np.abs(finite).max()) if finite.size else 1.0
    image = axes.imshow(
        values, origin="lower", cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest"
    )
    axes.set_facecolor(PALE)
    axes.grid(visible=False)
    axes.set_xticks(range(0, layout.units, max(1, layout.units // 16)))
    axes.set_yticks(range(0, layout.layers, max(1, layout.layers // 16)))
    axes.set_xlabel("head" if layout.heads_per_unit == 1 else "KV group")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, shrink=0.85)
    return figure


def _layer_costs(spans: dict[str, Any]) -> dict[int, float]:
    """{layer: rise of the loss}, of the candidates of one follower and the layer below it."""
    return {
        span["followers"][0]: span["loss_rise"]
        for span in spans["candidates"]
        if span["followers"] == [span["leader"] + 1] and math.isfinite(span["loss_rise"])
    }


def _bars(costs: Mapping[int, float]) -> Figure:
    figure, axes = _axes("layer", "rise of the loss")
    axes.bar(list(costs), list(costs.values()), color=GREEN)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(sorted(costs)[:: max(1, len(costs) // 16)])
    axes.grid(visible=False, axis="x")
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _matrix(rows: Any) -> NDArray[np.float64]:
    """Null becomes nan."""
    return np.array(rows or [], dtype=np.float64)


def drawn(file: Path) -> str | None:
    """The data URI of a picture that a stage has drawn, from the SVG beside its PNG."""
    vector = file.with_suffix(".svg")
    if not vector.is_file():
        return None
    return data_uri(themed_file(vector.read_text(encoding="utf-8")).encode(), "image/svg+xml")
