"""The exported formats of a run, to choose one from: what each takes, its speed, and its runtimes.

Compact and dense are timed beside the stock base, in the same rounds. A GGUF file is timed by
llama.cpp's own tools, not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from train.common.sizes import size
from train.evaluation.models import Judged, whole_exports
from train.evaluation.score import Score, change

RUNTIMES = {
    "compact": "transformers with postshare, or trust_remote_code; vLLM by our plugin",
    "dense": "transformers, vLLM, TGI, SGLang; llama.cpp after postshare gguf",
    "gguf": "llama.cpp and what is built on it",
}
"""What loads a format, by its folder in ``export``."""

STOCK = "stock"
HEADINGS = ("format", "on disk", "in memory", "cache a token", "prefill time", "decode time")


def exported_models(run: Path, models: Sequence[Judged]) -> list[Judged]:
    """The formats of a run that can be timed and are not among its models; none without a base.

    Args:
        models: of the run; the first is the base.
    """
    if models[0].name != "base":
        return []
    known = {model.folder for model in models}
    folders = [run / "export" / kind for kind in whole_exports(run)]
    return [
        Judged(folder.name, folder, models[0].tokenizer)
        for folder in folders
        if folder not in known and folder.is_dir()
    ]


def format_rows(run: Path, scores: Mapping[Path, Sequence[Score]]) -> list[dict[str, Any]]:
    """One row for stock and one for each format that the run has.

    Times are ratios to stock with their quartiles, null where they were not measured; sizes are
    bytes.

    Args:
        scores: of the task ``speed``, by the folder of the model; the first is stock.
    """
    stock, reference = next(iter(scores.items()))
    rows = [_row(STOCK, _files(stock), reference, reference)]
    for kind in (*whole_exports(run), "gguf"):
        folder = run / "export" / kind
        if folder.is_dir():
            rows.append(_row(kind, _files(folder), scores.get(folder), reference))
    return rows


def _row(
    name: str, disk: int, own: Sequence[Score] | None, stock: Sequence[Score]
) -> dict[str, Any]:
    row: dict[str, Any] = {"format": name, "disk": disk, "loads in": RUNTIMES.get(name)}
    for key, metric in (("resident", "resident bytes"), ("cache", "cache bytes/token")):
        row[key] = None if own is None else _of(own, metric).value
    for key, metric in (("prefill", "prefill tokens/s"), ("decode", "decode tokens/s")):
        found = None
        if own is not None and own is not stock:
            faster = change(_of(own, metric), _of(stock, metric))
            assert faster is not None
            assert faster.interval is not None
            low, high = faster.interval
            found = {
                "ratio": 1 / (1 + faster.value),
                "quartiles": [1 / (1 + high), 1 / (1 + low)],
            }
        row[key] = found
    return row


def _of(scores: Sequence[Score], metric: str) -> Score:
    return next(score for score in scores if score.metric == metric)


def _files(folder: Path) -> int:
    """Bytes of the weight files of a folder."""
    files = (*folder.glob("*.safetensors"), *folder.glob("*.gguf"))
    return sum(file.stat().st_size for file in files)


def format_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows as text, a cell for each of :data:`HEADINGS`; times are against stock."""

    def ratio(row: Mapping[str, Any], key: str) -> str:
        if row["format"] == STOCK:
            return "1"
        return "not measured" if row[key] is None else f"{row[key]['ratio']:.2f}"

    def held(row: Mapping[str, Any], key: str) -> str:
        return "" if row[key] is None else size(row[key], ".3g")

    return [
        (
            row["format"],
            size(row["disk"], ".3g"),
            held(row, "resident"),
            "" if row["cache"] is None else f"{row['cache']:,.0f} B",
            ratio(row, "prefill"),
            ratio(row, "decode"),
        )
        for row in rows
    ]


def format_table(rows: Sequence[Mapping[str, Any]]) -> tuple[Table, list[str]]:
    """The formats for a terminal, and below them what loads each."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == "format" else "right", no_wrap=True)
    for cells in format_cells(rows):
        shown.add_row(*cells)
    notes = [f"{row['format']} loads in {row['loads in']}" for row in rows if row["loads in"]]
    return shown, notes
