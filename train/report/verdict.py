"""The verdict of a run: whether it is worth it, what it saved, and what that cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from train.common.sizes import size
from train.evaluation.bootstrap import Interval, interval
from train.evaluation.figures import BATCH, NOT_MEASURED, Figures
from train.evaluation.summary import model_names, units_of
from train.report.data import RunData
from train.report.decision import RULE, Cost, Decision, decide
from train.report.rivals import Rivals


@dataclass(frozen=True)
class Tile:
    """One number of the verdict.

    Attributes:
        tone: ``good`` or ``bad`` where a difference is beyond chance, else empty.
    """

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Verdict:
    decision: Decision
    headline: str
    tiles: tuple[Tile, ...]
    explanation: str
    rule: str = RULE


def judge(data: RunData, rivals: Rivals | None) -> Verdict | None:
    """None where nothing has been evaluated."""
    summary, figures = data.summary, data.figures
    if summary is None or figures is None:
        return None
    values = summary["perplexity"]
    shipped = "direct" if values["post"] is None else "post"
    reference = "base" if values["continued"] is None else "continued"
    tiles = (
        _weights(summary, figures),
        _cache(figures),
        _decode(data, figures),
        _against(data, summary, shipped, reference),
        _against_chance(summary, rivals),
    )
    return Verdict(
        decision=_decision(data, summary, figures, rivals),
        headline=_headline(data, summary, figures, shipped, reference),
        tiles=tuple(tile for tile in tiles if tile is not None),
        explanation=_explanation(data, summary, shipped),
    )


def difference(data: RunData, name: str, reference: str) -> Interval | None:
    """95 % interval of how far a model's loss lies above another's (nats per token)."""
    one, other = data.blocks.get(name), data.blocks.get(reference)
    if one is None or other is None or one.tokens != other.tokens:
        return None
    return interval((one,), (other,))


def spread(bounds: Interval) -> str:
    """An interval of a difference of losses, as one of a ratio of perplexities."""
    return f"{math.expm1(bounds[0]):+.1%} to {math.expm1(bounds[1]):+.1%}"


# --- the decision ---------------------------------------------------------------------------------


def _decision(
    data: RunData, summary: dict[str, Any], figures: Figures, rivals: Rivals | None
) -> Decision:
    decode = figures.decode
    return decide(
        {
            "weights": 1 - figures.weight_ratio,
            "KV cache": 1 - figures.cache_bytes / figures.stock_cache_bytes,
        },
        None if decode is None else decode.quartiles,
        _cost(data, summary, rivals),
        None if rivals is None else rivals.better(),
    )


def _cost(data: RunData, summary: dict[str, Any], rivals: Rivals | None) -> Cost | None:
    """Over *continued*, of as many seeds as there are; over the base where nothing was trained."""
    values = summary["perplexity"]
    if values["post"] is None:
        change = values["direct"] / values["base"] - 1
        return Cost.measured(change, difference(data, "direct", "base"), 1, trained=False)
    if values["continued"] is None:
        return None
    if rivals is not None and (found := rivals.above("continued")) is not None:
        change, bounds, seeds = found
        return Cost.measured(math.expm1(change), bounds, seeds, trained=True)
    change = values["post"] / values["continued"] - 1
    return Cost.measured(change, difference(data, "post", "continued"), 1, trained=True)


# --- words ----------------------------------------------------------------------------------------


def _headline(
    data: RunData, summary: dict[str, Any], figures: Figures, shipped: str, reference: str
) -> str:
    cache = figures.cache_bytes / figures.stock_cache_bytes
    parts = [
        _less(figures.weight_ratio, "bytes of weights"),
        _less(cache, "KV cache") if cache != 1 else "no KV cache saved",
    ]
    if figures.decode is None:
        parts.append(f"decode time {NOT_MEASURED}")
    else:
        ratio = figures.decode.ratio
        parts.append(f"{abs(ratio - 1):.1%} {'less' if ratio < 1 else 'more'} time to decode")
    other = {"continued": "the same training without sharing", "base": "the base model"}[reference]
    change = summary["perplexity"][shipped] / summary["perplexity"][reference] - 1
    bounds = difference(data, shipped, reference)
    if bounds is not None and bounds[0] <= 0 <= bounds[1]:
        quality = f"a perplexity that cannot be told apart from that of {other}"
    else:
        how = "higher" if change > 0 else "lower"
        quality = f"{abs(change):.1%} {how} perplexity than {other}"
    said = f"{', '.join(parts)}; {quality}"
    return said[0].upper() + said[1:]


def _less(ratio: float, what: str) -> str:
    return f"{abs(1 - ratio):.1%} {'fewer' if what[:5] == 'bytes' else 'less'} {what}"


def _explanation(data: RunData, summary: dict[str, Any], shipped: str) -> str:
    blocks = data.blocks.get(shipped)
    text = (
        f"Perplexity is over {sum(blocks.tokens):,} held-out tokens in {len(blocks.tokens)} blocks."
        if blocks is not None
        else ""
    )
    if summary["perplexity"]["continued"] is None:
        return f"{text} There is no control: it was not trained (evaluate.continued)."
    return (
        f"{text} The control, continued, is the same training without penalty and sharing. "
        "Stock is the base in the dtype of the export."
    )


# --- numbers --------------------------------------------------------------------------------------


def _weights(summary: dict[str, Any], figures: Figures) -> Tile:
    stock = round(figures.weight_bytes / figures.weight_ratio)
    units = units_of(summary)
    changed = [
        f"{units[what]} of {units['total']} {units['name']} {what}"
        for what in ("tied", "removed")
        if units[what]
    ]
    detail = f"{size(figures.weight_bytes, '.3g')}, stock {size(stock, '.3g')}"
    return Tile("weight bytes", f"{figures.weight_ratio - 1:+.1%}", "; ".join([detail, *changed]))


def _cache(figures: Figures) -> Tile:
    held, stock = (
        size(BATCH * figures.context * each, ".3g")
        for each in (figures.cache_bytes, figures.stock_cache_bytes)
    )
    label, ratio = "cache bytes per token", figures.cache_bytes / figures.stock_cache_bytes
    detail = f"{figures.cache_bytes:,}; {BATCH} x {figures.context:,} tokens: {held}"
    if ratio == 1:
        return Tile(label, "as stock", detail)
    return Tile(label, f"{ratio - 1:+.1%}", f"{detail}, stock {stock}")


def _decode(data: RunData, figures: Figures) -> Tile:
    label, found = "decode time against stock", figures.decode
    if found is None:
        cure = f"postshare evaluate {data.folder} --tasks speed"
        return Tile(label, NOT_MEASURED, cure)
    low, high = found.quartiles
    tone = "good" if high < 1 else "bad" if low > 1 else ""
    quartiles = f"quartiles {low - 1:+.1%} to {high - 1:+.1%}"
    return Tile(label, f"{found.ratio - 1:+.1%}", f"{quartiles}; {found.how}", tone)


def _against(data: RunData, summary: dict[str, Any], shipped: str, other: str) -> Tile:
    values, names = summary["perplexity"], model_names(summary)
    bounds = difference(data, shipped, other)
    details = [] if bounds is None else [f"95 %: {spread(bounds)}"]
    shown = [name for name in ("continued", "base") if values[name] is not None]
    others = ", ".join(f"{names[name]} {values[name]:.2f}" for name in shown)
    details.append(f"{values[shipped]:.2f}, {others}")
    change = values[shipped] / values[other] - 1
    label = f"perplexity against {names[other]}"
    return Tile(label, f"{change:+.1%}", "; ".join(details), _tone(bounds))


def _against_chance(summary: dict[str, Any], rivals: Rivals | None) -> Tile | None:
    """Against random pairs, or where nothing is tied against random removals."""
    what, control = (
        ("random pairs", "random-pairs")
        if summary["heads"]["tied"]
        else ("random removals", "pruned-random")
    )
    if rivals is None or (found := rivals.above(control)) is None:
        return None
    change, bounds, seeds = found
    label = f"perplexity against {what}"
    detail = f"95 %: {spread(bounds)}; {seeds} seed{'s' if seeds > 1 else ''}"
    return Tile(label, f"{math.expm1(change):+.1%}", detail, _tone(bounds))


def _tone(bounds: Interval | None) -> str:
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return ""
    return "good" if bounds[1] < 0 else "bad"
