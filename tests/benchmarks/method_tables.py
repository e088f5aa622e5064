"""docs/methods.md from the lines of its trainings: for each base a table of each size.

    python tests/benchmarks/method_tables.py

method_table.py does it after every training. A row with several seeds shows their mean, and the
lowest and highest below it; it is compared with *continued* of the same seed and objective.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "methods.md"

Line = dict[str, Any]
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """A base model that the methods are measured on.

    Attributes:
        config: the YAML of its rows, in this folder.
        results: the lines of its trainings; the picture lies beside, as SVG.
    """

    name: str
    heads: int
    config: Path
    results: Path

    @property
    def picture(self) -> Path:
        return self.results.with_suffix(".svg")

    @property
    def marks(self) -> tuple[str, str]:
        """Around its tables in the page."""
        return f"<!-- tables of {self.name}: made by method_tables.py -->", "<!-- /tables -->"

    def settings(self) -> dict[str, Any]:
        """The YAML: `base`, `sizes` and `rows`."""
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    def rows(self) -> Rows:
        return self.settings()["rows"]

    def read(self) -> list[Line]:
        """The trainings that have finished."""
        if not self.results.is_file():
            return []
        return [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines()]


BASES = {
    base.name: base
    for base in (
        Base("mixed7M", 64, HERE / "methods.yaml", DOCS / "methods.jsonl"),
        Base("mixed52M", 96, HERE / "methods_52m.yaml", DOCS / "methods-52m.jsonl"),
    )
}


def tables(lines: list[Line], rows: Rows, heads: int = 64) -> str:
    """A table for each size that has a line, spans last, in the order of the rows."""
    spans = [name for name, row in rows.items() if "spans" in row["recipe"]]
    of_heads = [line for line in lines if line["row"] not in spans]
    of_spans = [line for line in lines if line["row"] in spans]
    parts = [
        f"**{size} %: {int(size) * heads // 100} of {heads} heads**\n\n"
        + _table([line for line in of_heads if line["size"] == size], lines, rows)
        for size in _sizes(of_heads)
    ]
    parts += [
        f"**{size} of 8 layers follow{'s' if size == '1' else ''}**\n\n"
        + _table([line for line in of_spans if line["size"] == size], lines, rows)
        for size in _sizes(of_spans)
    ]
    return "\n\n".join(parts)


def _sizes(lines: Iterable[Line]) -> list[str]:
    return sorted({line["size"] for line in lines}, key=int)


def _table(lines: list[Line], every: list[Line], rows: Rows) -> str:
    controls = controls_of(every, rows)
    base = every[0]["bytes"]["base"]
    out = ["| row | seeds | untrained | trained | above its *continued* | bytes |"]
    out.append("| --- | --- | --- | --- | --- | --- |")
    out.append(
        f"| the model, not trained on | | {every[0]['perplexity']['base']:.2f} | | | {base:,} |"
    )
    used = {"distill" in rows[line["row"]]["recipe"] for line in lines}
    for distilled, of_seed in controls.items():
        if of_seed and distilled in used:
            name = "*continued*, distilled" if distilled else "*continued*"
            out.append(f"| {name} | {len(of_seed)} | | {_spread(of_seed.values())} | | {base:,} |")
    for name, row in rows.items():
        found = [line for line in lines if line["row"] == name]
        if not found:
            continue
        control = controls["distill" in row["recipe"]]
        cells = (
            row["what"],
            len(found),
            _spread(
                line["perplexity"]["direct"] for line in found if "direct" in line["perplexity"]
            ),
            _spread(line["perplexity"]["post"] for line in found),
            _spread(above(found, control), lambda value: f"{value:z.2f} %"),
            f"{max(stored(line['bytes']) for line in found):,}",
        )
        out.append(f"| {' | '.join(map(str, cells))} |".replace("|  |", "| |"))
    return "\n".join(out)


def controls_of(lines: list[Line], rows: Rows) -> dict[bool, dict[int, float]]:
    """Perplexity of *continued* for each seed, without a teacher and (True) with one."""
    return {
        distilled: {
            line["seed"]: line["perplexity"]["continued"]
            for line in lines
            if "continued" in line["perplexity"]
            and ("distill" in rows[line["row"]]["recipe"]) == distilled
        }
        for distilled in (False, True)
    }


def above(lines: list[Line], control: dict[int, float]) -> list[float]:
    """How far each training lies above *continued* of its seed, in percent."""
    return [
        100 * (line["perplexity"]["post"] / control[line["seed"]] - 1)
        for line in lines
        if line["seed"] in control
    ]


def stored(bytes_: dict[str, int | None]) -> int:
    """The compact export, or by arithmetic its factors, and the adapter beside it."""
    return (bytes_["compact"] or bytes_.get("factored") or 0) + (bytes_.get("adapter") or 0)


def _spread(values: Iterable[float], show: Callable[[float], str] = "{:.2f}".format) -> str:
    found = list(values)
    if not found:
        return ""
    mean = show(statistics.fmean(found))
    return mean if len(found) == 1 else f"{mean} ({show(min(found))} to {show(max(found))})"


def filled(page: str) -> str:
    """The text of a page with all tables between their marks."""
    for base in BASES.values():
        begin, end = base.marks
        before, rest = page.split(begin)
        made = tables(base.read(), base.rows(), base.heads)
        page = f"{before}{begin}\n\n{made}\n\n{end}{rest.split(end, 1)[1]}"
    return page


def write() -> None:
    """Bring docs/methods.md up to date."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
