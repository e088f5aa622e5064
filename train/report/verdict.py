"""The verdict of a run: what it saved, and what that cost, against each of its rivals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from train.common.progress import clock
from train.common.sizes import size
from train.evaluation.bootstrap import Interval, interval
from train.evaluation.speed import TASK as SPEED
from train.evaluation.summary import bytes_of, model_names
from train.report.data import RunData
from train.report.rivals import Rivals

RESIDENT = "resident bytes"
LARGE = 10**8
"""Resident bytes below which a model drowns in what libraries load; the table has them anyway."""


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
    headline: str
    explanation: str
    tiles: tuple[Tile, ...]


def judge(data: RunData, rivals: Rivals | None) -> Verdict | None:
    """None where nothing has been evaluated."""
    summary = data.summary
    if summary is None:
        return None
    shipped = "post" if summary["perplexity"]["post"] is not None else "direct"
    reference = "base" if summary["perplexity"]["continued"] is None else "continued"
    return Verdict(
        headline=_headline(data, summary, shipped, reference),
        explanation=_explanation(data, summary, shipped),
        tiles=tuple(
            tile
            for tile in (
                _perplexity(summary, shipped),
                _against(data, summary, shipped, reference),
                _against(data, summary, shipped, "direct"),
                _against_chance(summary, rivals),
                _weights(summary),
                _heads(summary),
                _cache(summary),
                _speed(data),
                _time(data, summary),
            )
            if tile is not None
        ),
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


def percent(ratio: float) -> str:
    return f"{ratio:.1%}"


# --- words ----------------------------------------------------------------------------------------


def _headline(data: RunData, summary: dict[str, Any], shipped: str, reference: str) -> str:
    change = summary["perplexity"][shipped] / summary["perplexity"][reference] - 1
    bounds = difference(data, shipped, reference)
    other = {
        "continued": "the same training without sharing",
        "base": "the base model",
    }[reference]
    saved = _saved(summary)
    if bounds is not None and bounds[0] <= 0 <= bounds[1]:
        return f"{saved}, at a perplexity that cannot be told apart from that of {other}"
    how = "higher" if change > 0 else "lower"
    return f"{saved}, at {abs(change):.1%} {how} perplexity than {other}"


def _saved(summary: dict[str, Any]) -> str:
    """Parameters and cache: bytes also change with the data type, which is no merit of sharing."""
    parameters, cache = summary["parameters"], summary["cache"]
    parts = [f"{1 - parameters['stored'] / parameters['base']:.1%} fewer parameters"]
    kept = cache["stored_elements_per_token"] / cache["base_elements_per_token"]
    if kept != 1:
        parts.append(f"{1 - kept:.1%} less KV cache")
    return " and ".join(parts)


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
        "Intervals are 95\u00a0% over the held-out text; another seed may differ by more."
    )


# --- numbers --------------------------------------------------------------------------------------


def _perplexity(summary: dict[str, Any], shipped: str) -> Tile:
    values, names = summary["perplexity"], model_names(summary)
    others = [
        f"{names[name]} {values[name]:.2f}"
        for name in ("base", "continued", "direct")
        if name != shipped and values[name] is not None
    ]
    return Tile(f"perplexity of {names[shipped]}", f"{values[shipped]:.2f}", ", ".join(others))


def _against(data: RunData, summary: dict[str, Any], shipped: str, other: str) -> Tile | None:
    values = summary["perplexity"]
    if other == shipped or values[other] is None:
        return None
    bounds = difference(data, shipped, other)
    details = [] if bounds is None else [f"95 %: {spread(bounds)}"]
    if other == "direct" and (won := _won_back(values)) is not None:
        details.append(f"{won:.0%} of what it loses is won back")
    label = f"perplexity against {model_names(summary)[other]}"
    change = values[shipped] / values[other] - 1
    return Tile(label, f"{change:+.1%}", "; ".join(details), _tone(bounds))


def _won_back(values: dict[str, float | None]) -> float | None:
    """Of the loss (nats per token) that sharing adds untrained to *continued*."""
    direct, post, continued = (values[name] for name in ("direct", "post", "continued"))
    if direct is None or post is None or continued is None or direct <= continued:
        return None
    return math.log(direct / post) / math.log(direct / continued)


def _against_chance(summary: dict[str, Any], rivals: Rivals | None) -> Tile | None:
    """Against random pairs, or where nothing is tied against random removals."""
    heads = summary["heads"]
    if not (heads["tied"] or heads["removed"]):
        return None
    what, control = (
        ("random pairs", "random-pairs") if heads["tied"] else ("random removals", "pruned-random")
    )
    label = f"perplexity against {what}"
    if rivals is None:
        return Tile(label, "not measured", f"postshare compare RECIPE --controls {control}")
    if (found := rivals.above(control)) is None:
        return Tile(label, "not measured", f"the comparison has no {control}")
    change, bounds = found
    return Tile(label, f"{math.expm1(change):+.1%}", f"95 %: {spread(bounds)}", _tone(bounds))


def _weights(summary: dict[str, Any]) -> Tile:
    sizes, parameters = summary["bytes"], summary["parameters"]
    saved = f"{1 - parameters['stored'] / parameters['base']:.1%} of the parameters saved"
    exported = bytes_of(summary, "post")
    if exported is None or sizes["base"] is None:
        return Tile("parameters", f"{parameters['stored']:,}", saved)
    change = f"{exported / sizes['base'] - 1:+.1%}"
    return Tile(
        "weights", size(exported, ".3g"), f"{change} of {size(sizes['base'], '.3g')}; {saved}"
    )


def _heads(summary: dict[str, Any]) -> Tile | None:
    heads = summary["heads"]
    changed = [f"{heads[what]} {what}" for what in ("tied", "removed") if heads[what]]
    if not changed:
        return None
    return Tile(
        "heads",
        f"{' and '.join(changed)} of {heads['total']}",
        f"{heads['effective_ratio']:.1%} change, {heads['requested_ratio']:.1%} asked for",
    )


def _cache(summary: dict[str, Any]) -> Tile:
    cache = summary["cache"]
    base, stored = cache["base_elements_per_token"], cache["stored_elements_per_token"]
    detail = f"{stored:,} numbers a token, {'as' if stored == base else f'of {base:,}'} in the base"
    return Tile("KV cache", f"{stored / base:.1%}", detail)


def _speed(data: RunData) -> Tile:
    """Answering, base against export, where `postshare evaluate RUN --tasks speed` was called."""
    entry = (data.scores or {}).get(SPEED)
    if entry is None:
        cure = f"postshare evaluate {data.folder} --tasks speed"
        return Tile("speed of answers", "not measured", cure)
    shipped = {score["metric"]: score for score in entry["models"][-1]["scores"]}
    parts = [
        ("prefill", "prefill tokens/s", "/s"),
        ("first token", "first token, ms", " ms"),
        ("cache", "cache bytes/token", " bytes a token"),
    ]
    if shipped[RESIDENT]["value"] >= LARGE:
        parts.append(("resident", RESIDENT, ""))
    said = [
        f"{name} {_of_speed(metric, shipped[metric]['value'])}{unit}{_compared(shipped[metric])}"
        for name, metric, unit in parts
    ]
    decode = "decode tokens/s"
    return Tile(
        f"{decode} (against {entry['models'][0]['name']})",
        f"{_of_speed(decode, shipped[decode]['value'])}{_compared(shipped[decode])}",
        ", ".join(said),
    )


def _of_speed(metric: str, value: float) -> str:
    if metric == RESIDENT:
        return size(int(value), ".3g")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _compared(score: dict[str, Any]) -> str:
    change = score.get("change")
    return "" if change is None else f" ({change['value']:+.1%})"


def _time(data: RunData, summary: dict[str, Any]) -> Tile | None:
    """What the penalty and the sharing cost, or save, while training."""
    if not summary["seconds"]:
        return None
    detail = f"{summary['tokens']:,} tokens"
    control = data.trainings.get("continued")
    if control is not None and control.result is not None and control.result["seconds"]:
        seconds = control.result["seconds"]
        change = summary["seconds"] / seconds - 1
        detail += f"; {change:+.1%} against continued ({clock(seconds)})"
    return Tile("time of post-training", clock(summary["seconds"]), detail)


def _tone(bounds: Interval | None) -> str:
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return ""
    return "good" if bounds[1] < 0 else "bad"
