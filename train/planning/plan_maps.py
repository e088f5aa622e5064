"""Pictures of a plan: how similar the units are, which are tied to which, which are removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyArrowPatch, Rectangle

from sa_models.basis import FACTORED, SharedBasis, factor_sizes
from sa_models.heads import HeadLayout
from sa_models.plan import SharingPlan
from sa_models.scores.attention_maps import Isotropy
from sa_models.spans import AttentionSpan
from train.common.figure_style import (
    BLUE,
    DARK_GREY,
    DIVERGING,
    FILE_STYLE,
    GREEN,
    ORANGE,
    PALE,
    SEQUENTIAL,
    SKY,
    SMALL,
    VERMILLION,
    WIDTH,
    save,
)


class DrawnSpan(Protocol):
    """What is drawn of a span: a SpanChoice, or the span of a plan."""

    @property
    def leader(self) -> int: ...

    @property
    def followers(self) -> tuple[int, ...]: ...


@rc_context(FILE_STYLE)
def save_similarity(scores: torch.Tensor, layout: HeadLayout, score: str, path: Path) -> None:
    """Heat map of the scores between all units, (units, units), as PNG and SVG."""
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    axes = figure.add_subplot()
    shown = scores.clone().fill_diagonal_(float("nan"))
    finite = shown[~shown.isnan()]
    limit = float(finite.abs().max()) if finite.numel() else 1.0
    image = axes.imshow(
        shown.numpy(), cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest"
    )
    axes.set_facecolor(PALE)
    edges = [layer * layout.units - 0.5 for layer in range(1, layout.layers)]
    if layout.layers <= 40:
        for edge in edges:
            axes.axhline(edge, color="0.8", linewidth=0.4)
            axes.axvline(edge, color="0.8", linewidth=0.4)
    step = max(1, layout.layers // 8)
    ticks = [(layer + 0.5) * layout.units - 0.5 for layer in range(0, layout.layers, step)]
    labels = [str(layer) for layer in range(0, layout.layers, step)]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.set_xlabel("layer of the source")
    axes.set_ylabel("layer of the target")
    kind = "heads" if layout.heads_per_unit == 1 else "KV groups"
    axes.set_title(f"Similarity of {kind}: {score}")
    figure.colorbar(image, ax=axes, shrink=0.85)
    save(figure, path)


@rc_context(FILE_STYLE)
def save_ties(plan: SharingPlan, layout: HeadLayout, path: Path) -> None:
    """Map of ties and removed units as PNG and SVG; see :func:`draw_plan_map`."""
    save(draw_plan_map(plan, layout), path)


def draw_plan_map(plan: SharingPlan, layout: HeadLayout, cell: float = 0.4) -> Figure:
    """Map of ties, removed units and spans, layers upward and units to the right.

    Args:
        cell: inches of a layer, where the map is not too high for it.
    """
    height = min(9.0, 1.8 + cell * layout.layers)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=False)
    ties = plan.effective().ties
    targets, sources = {tie.target for tie in ties}, {tie.source for tie in ties}
    removed = set(plan.removed)
    changed = targets | sources | removed
    size = 3000 / (layout.units + layout.layers) ** 1.35
    every = [(layer, unit) for layer in range(layout.layers) for unit in range(layout.units)]
    for label, color, members in (
        ("own weights", PALE, [u for u in every if u not in changed]),
        ("source", BLUE, sorted(sources)),
        ("target", ORANGE, sorted(targets)),
    ):
        if not members:
            continue
        axes.scatter(
            [unit for _, unit in members],
            [layer for layer, _ in members],
            s=size,
            c=color,
            label=label,
            marker="s",
            zorder=2,
        )
    if removed:
        units, layers = [unit for _, unit in removed], [layer for layer, _ in removed]
        axes.scatter(units, layers, s=size, c=VERMILLION, label="removed", marker="x", zorder=2)
    for tie in ties:
        axes.add_patch(
            FancyArrowPatch(
                tie.source[::-1],
                tie.target[::-1],
                arrowstyle="-|>",
                mutation_scale=8,
                connectionstyle="arc3,rad=0.12",
                color=DARK_GREY,
                linewidth=0.7,
                alpha=0.75,
                zorder=3,
            )
        )
    right = layout.units - 0.3
    for span in plan.spans:
        _draw_span(axes, span, right)
    axes.set_xlim(-0.7, right)
    axes.set_ylim(-0.7, layout.layers - 0.3)
    axes.set_xticks(range(0, layout.units, max(1, layout.units // 16)))
    axes.set_yticks(range(0, layout.layers, max(1, layout.layers // 16)))
    axes.set_xlabel("head" if layout.heads_per_unit == 1 else "KV group")
    axes.set_ylabel("layer")
    axes.set_title(_title(len(every), len(targets), len(sources), len(removed), plan))
    legend = figure.legend(loc="outside lower center", ncols=4 if removed else 3, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([45.0])  # type: ignore[union-attr]  # in a large map units are dots
    return figure


def draw_basis_map(basis: SharedBasis, layout: HeadLayout, cell: float = 0.4) -> Figure:
    """Map of a shared basis: layers upward, projections to the right, a block for each basis.

    A block spans the layers that share it and is the darker the more of their numbers are stored.

    Args:
        cell: inches of a layer, where the map is not too high for it.
    """
    figure = Figure(figsize=(WIDTH, min(9.0, 1.6 + cell * layout.layers)), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=False)
    sizes, columns = factor_sizes(layout, basis.layers), (*FACTORED, "o")
    for at, group in enumerate(basis.groups(layout.layers)):
        for column, projection in enumerate(FACTORED):
            rank, (one, dense) = basis.ranks(projection)[at], sizes[projection, at]
            corner, height = (column - 0.45, group[0] - 0.42), len(group) - 0.16
            axes.add_patch(
                Rectangle(corner, 0.9, height, color=SKY, alpha=rank * one / dense, linewidth=0)
            )
            axes.add_patch(Rectangle(corner, 0.9, height, fill=False, edgecolor=BLUE))
            middle = (group[0] + group[-1]) / 2
            words = f"rank {rank}: {rank * one / dense:.0%}"
            axes.text(column, middle, words, ha="center", va="center", size=SMALL)
    for layer in range(layout.layers):
        axes.add_patch(Rectangle((len(FACTORED) - 0.45, layer - 0.42), 0.9, 0.84, color=PALE))
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-0.6, layout.layers - 0.4)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(0, layout.layers, max(1, layout.layers // 16)))
    axes.set_xlabel("projection (grey: own weights)")
    axes.set_ylabel("layer")
    shared = f"{basis.layers} adjacent layers share a basis" if basis.layers > 1 else "low rank"
    axes.set_title(f"q, k and v: {shared},\n% of their numbers are stored")
    return figure


def _draw_span(axes: Axes, span: AttentionSpan, right: float) -> None:
    """A line beside the map from the leader (dot) to its followers (ticks), which are shaded."""
    for follower in span.followers:
        axes.axhspan(follower - 0.45, follower + 0.45, color=SKY, alpha=0.35, zorder=1)
    layers, x = [*span.layers], right + 0.35
    style: Any = {"color": GREEN, "clip_on": False, "linewidth": 1.6}
    axes.plot([x] * len(layers), layers, marker="_", markersize=7, **style)
    axes.plot([x], [span.leader], marker="o", markersize=7, **style)
    what = "attention" if span.share == "attention" else "keys, values"
    axes.annotate(
        f" {what}\n of layer {span.leader}",
        (x, sum(layers) / len(layers)),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        size=SMALL,
        annotation_clip=False,
    )


def _title(units: int, targets: int, sources: int, removed: int, plan: SharingPlan) -> str:
    lines = []
    if targets:
        lines.append(f"{targets} of {units} units take the weights of {sources}")
    if removed:
        lines.append(f"{removed} of {units} units are removed")
    if plan.spans:
        followers = sum(len(span.followers) for span in plan.spans)
        lines.append(
            "1 layer reuses another's attention"
            if followers == 1
            else f"{followers} layers reuse another's attention"
        )
    return ",\n".join(lines)


@rc_context(FILE_STYLE)
def save_isotropy(isotropy: Isotropy, spans: Sequence[DrawnSpan], path: Path) -> None:
    """Heat maps of the isotropy of all layers, with and without the sink, as PNG and SVG.

    Spans are outlined on the diagonal, from the leader to the last follower.
    """
    figure = Figure(figsize=(WIDTH, 8.6), layout="constrained")
    every = figure.subplots(2, 1, sharex=True)
    for axes, values, title in zip(
        every,
        (isotropy.maps, isotropy.without_sink),
        ("all keys", "without the first token (sink)"),
        strict=True,
    ):
        image = draw_isotropy(axes, values, spans)
        axes.set_title(title)
        axes.set_ylabel("layer")
    every[0].set_xlabel("")
    outlined = ",\nspans outlined" if spans else ""
    figure.suptitle(f"Isotropy: cosine of two layers' attention maps{outlined}")
    figure.colorbar(image, ax=every, shrink=0.6)
    save(figure, path)


def draw_isotropy(axes: Axes, values: torch.Tensor, spans: Sequence[DrawnSpan]) -> AxesImage:
    """One heat map of isotropy, (layers, layers), with spans outlined."""
    layers = len(values)
    ticks = range(0, layers, max(1, layers // 16))
    shown = values.clone().fill_diagonal_(float("nan"))
    image = axes.imshow(shown.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
    axes.grid(visible=False)
    if layers <= 8:
        for row, column in torch.isfinite(shown).nonzero().tolist():
            value = float(shown[row, column])
            color = "white" if value < 0.6 else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", size=SMALL, color=color
            )
    for span in spans:
        size = 1 + max(span.followers) - span.leader
        corner = (span.leader - 0.5, span.leader - 0.5)
        axes.add_patch(
            Rectangle(corner, size, size, fill=False, edgecolor=VERMILLION, linewidth=2.0)
        )
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xlabel("layer")
    axes.set_facecolor("0.92")
    return image


@rc_context(FILE_STYLE)
def save_sensitivity(
    units: torch.Tensor, layers: Sequence[float], layout: HeadLayout, path: Path
) -> None:
    """Rise of the loss without each unit, (layers, units), and each layer, as PNG and SVG.

    Args:
        units: nan where a unit has not been measured.
    """
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))
    finite = units[units.isfinite()]
    limit = float(finite.abs().max()) if finite.numel() else 1.0
    image = axes.imshow(
        units.numpy(),
        origin="lower",
        aspect="auto",
        cmap=DIVERGING,
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
    )
    axes.set_facecolor(PALE)
    axes.set_xticks(range(0, layout.units, max(1, layout.units // 8)))
    axes.set_yticks(range(0, layout.layers, max(1, layout.layers // 16)))
    axes.set_xlabel("head" if layout.heads_per_unit == 1 else "KV group")
    axes.set_ylabel("layer")
    axes.set_title("one head\n(estimated)")
    bars.barh(range(layout.layers), layers, color=BLUE)
    bars.axvline(0, color=DARK_GREY, linewidth=0.8)
    bars.set_title("the layer\n(measured)")
    figure.suptitle("Rise of the loss, nats per token, without")
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.9)
    save(figure, path)
