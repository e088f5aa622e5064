"""The tables of one run: text that is ready to be shown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sa_models.basis import FACTORED, factor_sizes
from train.common.progress import clock
from train.common.sizes import size
from train.evaluation.formats import HEADINGS, format_cells
from train.evaluation.score import PERPLEXITY
from train.evaluation.speed import TASK as SPEED
from train.evaluation.summary import STRUCTURED, model_names, summary_cells
from train.report.data import RunData, Training
from train.report.rivals import Rivals
from train.report.verdict import difference, spread

MOST_ROWS = 400
"""Of a table of pairs; plan.json has them all."""
MOST_STARTS = 10


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        plain: the cells are words, aligned left; otherwise all but the first column are numbers.
        folded: it is shown when it is asked for.
        described: the second column is words, which may take several lines.
        quoted: the cells are text of models.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    plain: bool = False
    folded: bool = False
    described: bool = False
    quoted: bool = False

    @property
    def broad(self) -> bool:
        """Whether a phone shows a part of it at a time."""
        return len(self.columns) > (2 if self.plain else 3)


def evaluation(data: RunData) -> Table | None:
    """The table of the terminal, with the interval of the difference from *continued*."""
    if data.summary is None:
        return None
    columns, cells = summary_cells(data.summary)
    rows = []
    for name, row in cells.items():
        bounds = None if name == "continued" else difference(data, name, "continued")
        rows.append((*row[:3], "" if bounds is None else spread(bounds), *row[3:]))
    every = [(*columns[:3], "95 %", *columns[3:]), *rows]
    # Without a control there is nothing to say about it.
    filled = [index for index in range(len(every[0])) if any(row[index] for row in rows)]
    head, *body = (tuple(row[index] for index in filled) for row in every)
    return Table("Evaluation", head, tuple(body))


def against_controls(rivals: Rivals | None) -> Table | None:
    """comparison.json."""
    if rivals is None:
        return None
    rows = [
        (
            row["name"],
            row.get("what", ""),
            f"{row['perplexity']:.2f}",
            f"{math.expm1(row['above_reference']):+.1%}" if row["above_reference"] else "",
            spread(row["above_reference_interval"]) if row["above_reference"] else "",
            f"{row['parameters']:,}",
            "" if row["bytes"] is None else f"{row['bytes']:,}",
        )
        for row in rivals.rows
    ]
    seeds = max(len(row.get("perplexities", ())) for row in rivals.rows)
    return Table(
        "Against its controls",
        ("model", "what it is", "perplexity", "vs continued", "95 %", "parameters", "bytes"),
        tuple(rows),
        f"Equal tokens, {seeds} seed{'s' if seeds > 1 else ''}, from postshare compare.",
        described=True,
    )


def tasks(data: RunData) -> Table | None:
    """task-scores.json: every task that was asked of the run's models."""
    if not data.scores:
        return None
    entries = {task: entry for task, entry in data.scores.items() if task != "model"}
    names = list(dict.fromkeys(m["name"] for entry in entries.values() for m in entry["models"]))
    rows = []
    for task, entry in entries.items():
        models = {model["name"]: model["scores"] for model in entry["models"]}
        for at, last in enumerate(entry["models"][-1]["scores"]):
            cells = (_score(models[n][at]["value"]) if n in models else "" for n in names)
            changed = _change(last, relative=task in (PERPLEXITY, SPEED))
            rows.append((f"{task}: {last['metric']}", *cells, *changed))
    if not rows:
        return None
    note = (
        "From postshare evaluate. Differences are relative for perplexity and speed, absolute for "
        "accuracies; of speed the spread is the quartiles of the rounds."
    )
    columns = ("task", *names, "last vs first", "95 %")
    return Table("Tasks and speed", columns, tuple(rows), note)


def formats(data: RunData) -> Table | None:
    """The formats of the export, where their speed was measured."""
    entry = (data.scores or {}).get(SPEED, {})
    rows = entry.get("formats")  # an earlier version wrote none
    if not rows:
        return None
    cells = [
        (name, row["loads in"] or "", *others)
        for (name, *others), row in zip(format_cells(rows), rows, strict=True)
    ]
    head, *columns = HEADINGS
    note = (
        f"From postshare evaluate, in {entry['dtype']} on {entry['device']}, one sequence at a "
        "time; times are against stock."
    )
    return Table("Formats", (head, "loads in", *columns), tuple(cells), note, described=True)


def _score(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _change(score: dict[str, Any], relative: bool) -> tuple[str, str]:
    change = score.get("change")
    if change is None:
        return "", ""

    def text(value: float) -> str:
        return f"{value:+.1%}" if relative else f"{value:+.4f}"

    bounds = change["interval"]
    spread = "" if bounds is None else f"{text(bounds[0])} to {text(bounds[1])}"
    return text(change["value"]), spread


def samples(data: RunData) -> Iterator[Table]:
    """How the models go on with each passage, below what its author wrote."""
    if data.samples is None:
        return
    names = STRUCTURED if data.summary is None else model_names(data.summary)
    shown = {name: texts for name, texts in data.samples["models"].items() if name in names}
    for at, passage in enumerate(data.samples["passages"]):
        rows = [("the text itself", _line(passage["text"]))]
        rows += [(names[name], _line(texts[at])) for name, texts in shown.items()]
        head = ("given", _line(passage["prompt"]))
        yield Table(f"Sample {at + 1}", head, tuple(rows), plain=True, quoted=True)


def _line(text: str) -> str:
    """Text with its line breaks as marks: a model that only breaks lines would fill the page."""
    return " ".join(text.replace("\n", " \u21b5 ").split())


def systems(data: RunData) -> Table | None:
    """Speed and memory of each training."""
    if not data.trainings:
        return None
    rows = tuple(_system(training) for training in data.trainings.values())
    columns = ("training", "steps", "tokens", "time", "tokens/s", "step", "data wait", "memory")
    return Table(
        "Throughput and memory",
        (*columns, "backend"),
        rows,
        "Time of a step is the median; memory is the peak of one process.",
    )


def _system(training: Training) -> tuple[str, ...]:
    result = training.result or {
        "steps": int(training.steps[-1]),
        "tokens": int(_last(training, "tokens")),
        "seconds": _last(training, "seconds"),
    }
    wait = _sum(training, "data_wait_seconds") / max(_sum(training, "step_seconds"), 1e-9)
    memory = max(_peak(training, "memory_bytes"), _peak(training, "memory_bytes_max"))
    return (
        training.name,
        f"{result['steps']:,}",
        f"{result['tokens']:,}",
        clock(result["seconds"]),
        f"{result['tokens'] / max(result['seconds'], 1e-9):,.0f}",
        f"{_median(training, 'step_seconds'):.3g} s",
        f"{wait:.1%}",
        size(int(memory), ".3g"),
        backend_name(training.backend),
    )


def backend_name(backend: dict[str, Any] | None) -> str:
    """`plain, 1 process, cpu`; empty where nothing was written."""
    if not backend:
        return ""
    count = backend.get("processes")
    processes = "" if count is None else f"{count} process{'' if count == 1 else 'es'}"
    words = (backend.get("backend"), processes, backend.get("device"))
    return ", ".join(str(word) for word in words if word)


def pairs(data: RunData) -> Table | None:
    """Every tie: its score, whether it beats chance, and how far training has brought it."""
    if data.plan is None or not data.plan.ties:
        return None
    p_values = {
        (tuple(pair["target"]), tuple(pair["source"])): pair["corrected"]
        for pair in (data.chance["pairs"] if data.chance else ())
    }
    rows = []
    for index, tie in enumerate(data.plan.ties[:MOST_ROWS]):
        p = p_values.get((tie.target, tie.source))
        rows.append(
            (
                _unit(tie.target),
                _unit(tie.source),
                ", ".join(tie.projections),
                "" if tie.score is None else f"{tie.score:.3f}",
                "" if p is None else f"{p:.1e}",
                *_way(data, index),
            )
        )
    more = len(data.plan.ties) - len(rows)
    columns = ("target", "source", "projections", "score", "p", "distance at first", "at last")
    note = "Units are layer.unit; p is corrected for the choice among all sources."
    if more:
        note += f" {more} more are in plan.json."
    return Table(f"{len(data.plan.ties)} pairs", columns, tuple(rows), note, folded=True)


def basis(data: RunData) -> Table | None:
    """Which layers share a basis, of which ranks, and what their factors take."""
    if data.plan is None or data.plan.basis is None or data.layout is None:
        return None
    shared, sizes = data.plan.basis, factor_sizes(data.layout, data.plan.basis.layers)
    rows = []
    for at, group in enumerate(shared.groups(data.layout.layers)):
        ranks = [shared.ranks(p)[at] for p in FACTORED]
        taken = sum(rank * sizes[p, at][0] for p, rank in zip(FACTORED, ranks, strict=True))
        whole = sum(sizes[p, at][1] for p in FACTORED)
        layers = ", ".join(map(str, group))
        rows.append((layers, *map(str, ranks), f"{taken:,}", f"{whole:,}", f"{taken / whole:.1%}"))
    return Table(
        "Basis Sharing",
        ("layers", "rank of q", "of k", "of v", "parameters", "of the weights", ""),
        tuple(rows),
        "q, k and v of these layers are each layer's coefficients times one basis.",
    )


def stock(data: RunData) -> Table | None:
    """The heads of the dense export, where every layer has lost as many units."""
    plan, layout = data.plan, data.layout
    units = None if plan is None or layout is None else plan.uniform_units(layout)
    if units is None or layout is None:
        return None
    left = layout.with_units(units)
    rows = (
        ("attention heads of a layer", f"{left.heads} of {layout.heads}"),
        ("KV heads of a layer", f"{left.kv_heads} of {layout.kv_heads}"),
        ("class", left.stock_class),
        ("tensor parallel sizes that divide them", ", ".join(map(str, left.tensor_parallel))),
    )
    note = "The dense export has the small tensors, no zeros, and needs nothing of ours."
    return Table("A stock model with fewer heads", ("", ""), rows, note, plain=True)


def _way(data: RunData, tie: int) -> tuple[str, str]:
    """Mean distance over the projections, in the first and the last row of pairs.jsonl."""
    if data.pairs is None or tie >= data.pairs.distance.shape[1]:
        return "", ""
    ends = data.pairs.distance[[0, -1], tie]
    if not np.isfinite(ends).any(axis=1).all():
        return "", ""
    first, last = np.nanmean(ends, axis=1)
    return f"{first:.3g}", f"{last:.3g}"


def engineering(data: RunData) -> list[Table | None]:
    """How the run was made: time and memory, commands, versions."""
    return [systems(data), starts(data), versions(data)]


def starts(data: RunData) -> Table | None:
    """The commands that made the run, the latest last."""
    if data.provenance is None:
        return None
    every = data.provenance["starts"]
    rows = tuple(
        (
            start["at"][:16].replace("T", " "),
            start["command"],
            f"{start['processes']} x {start['device']}",
        )
        for start in every[-MOST_STARTS:]
    )
    more = len(every) - len(rows)
    return Table(
        "Commands",
        ("started (UTC)", "command", "processes"),
        rows,
        f"{more} earlier starts are in provenance.json." if more else "",
        plain=True,
    )


def versions(data: RunData) -> Table | None:
    """Of the last start."""
    if data.provenance is None or not data.provenance["starts"]:
        return None
    last = data.provenance["starts"][-1]
    found = {**last["versions"], "platform": last["platform"]}
    return Table("Versions", ("package", "version"), tuple(found.items()), plain=True)


def _unit(unit: tuple[int, int]) -> str:
    return f"{unit[0]}.{unit[1]}"


def _column(training: Training, key: str) -> Any:
    values = training.columns.get(key, np.empty(0))
    return values[np.isfinite(values)]


def _sum(training: Training, key: str) -> float:
    return float(_column(training, key).sum())


def _last(training: Training, key: str) -> float:
    values = _column(training, key)
    return float(values[-1]) if len(values) else 0.0


def _peak(training: Training, key: str) -> float:
    return float(_column(training, key).max(initial=0))


def _median(training: Training, key: str) -> float:
    values = _column(training, key)
    return float(np.median(values)) if len(values) else 0.0
