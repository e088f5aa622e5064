"""The table of `postshare evaluate A B C`, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from sa_models.atomic_files import write_json
from train.evaluation.score import Change, Score, as_models, change


def table(
    scores: Mapping[str, Sequence[Score]], facts: Mapping[str, Any]
) -> tuple[Table, list[str]]:
    """For each metric one row a model, and the notes below it.

    Args:
        scores: of each model, the same metrics in the same order; the first model is the reference.
        facts: of the whole table, see :func:`save_json`.
    """
    names = short_names(list(scores))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("model", no_wrap=True)
    for heading in ("value", f"vs {names[0]}", "95 %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for at, reference in enumerate(next(iter(scores.values()))):
        shown.add_row(_title(reference))
        for name, own in zip(names, scores.values(), strict=True):
            score = own[at]
            found = None if score is reference else change(score, reference)
            cells = ("", "") if score is reference else _change(score, found)
            shown.add_row(f"  {name}", _value(score), *cells)
    return shown, _notes(scores, facts)


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell all names apart."""
    parts = [name.split("/") for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def save_json(path: Path, scores: Mapping[str, Sequence[Score]], facts: Mapping[str, Any]) -> None:
    """Write models, their scores, and what all were measured with.

    Args:
        facts: device, dtype, torch, how many results were cached and computed.
    """
    write_json(path, {"version": 1, **facts, "models": as_models(scores)})


def _title(score: Score) -> str:
    return score.metric if score.task == "model" else f"{score.task}: {score.metric}"


def _value(score: Score) -> str:
    value = score.value
    if score.kind == "size":
        return f"{value:,.0f}"
    if score.kind == "mean":
        return f"{value:.4f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _change(score: Score, found: Change | None) -> tuple[str, str]:
    if found is None:
        return "other tokens", ""

    def text(value: float) -> str:
        return f"{value:+.4f}" if score.kind == "mean" else f"{value:+.1%}"

    if found.interval is None:
        return text(found.value), ""
    low, high = found.interval
    return text(found.value), f"{text(low)} to {text(high)}"


def _notes(scores: Mapping[str, Sequence[Score]], facts: Mapping[str, Any]) -> list[str]:
    """What the numbers depend on, one line for each task."""
    first = next(iter(scores.values()))
    notes = []
    for task in dict.fromkeys(score.task for score in first):
        stated = next(score.stated for score in first if score.task == task)
        if task == "perplexity":
            notes.append(
                f"perplexity: {stated['text']}, {stated['tokens']:,} tokens, {stated['words']:,} "
                f"words; windows of {stated['context']}, stride {stated['stride']}"
            )
        elif task == "speed":
            notes.append(
                f"speed: {stated['device']}; prompt {stated['prompt']}, "
                f"{stated['new_tokens']} new tokens, batch 1; medians and quartiles of "
                f"{stated['rounds']} interleaved rounds"
            )
        elif task != "model":
            count = len(next(score for score in first if score.task == task).sums)
            shots = "/".join(map(str, stated["examples"]))
            notes.append(
                f"{task}: lm-eval {stated['lm_eval']}, {count:,} questions, {shots} examples"
            )
    kept = f"; {facts['cached']} results from the cache" if facts["cached"] else ""
    notes.append(f"in {facts['dtype']} on {facts['device']}{kept}")
    return notes
