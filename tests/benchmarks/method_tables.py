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

import numpy as np
import torch
import yaml

from sa_models.search.ranking import spearman

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "methods.md"
FEWEST_PLANS = 6
"""Of a rank correlation that is shown."""

Line = dict[str, Any]
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """A base model that the methods are measured on.

    Attributes:
        units, unit: how many units it has, and what they are.
        config: the YAML of its rows, in this folder.
        results: the lines of its trainings; the picture lies beside, as SVG.
    """

    name: str
    units: int
    layers: int
    config: Path
    results: Path
    unit: str = "heads"

    @property
    def picture(self) -> Path:
        return self.results.with_suffix(".svg")

    @property
    def plans(self) -> Path:
        """The plans that have been found, a line each."""
        return self.results.with_stem(f"{self.results.stem}-plans")

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
        return read_lines(self.results)


def read_lines(file: Path) -> list[Line]:
    """Of a file of lines; none where there is no file."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def add_lines(file: Path, *lines: Line) -> None:
    """Append to a file of lines, at once."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(line) + "\n" for line in lines))


BASES = {
    base.name: base
    for base in (
        Base(
            "smollm2",
            90,
            30,
            HERE / "methods_smollm2.yaml",
            DOCS / "methods-smollm2.jsonl",
            "KV groups",
        ),
        Base("mixed7M", 64, 8, HERE / "methods.yaml", DOCS / "methods.jsonl"),
        Base("mixed52M", 96, 12, HERE / "methods_52m.yaml", DOCS / "methods-52m.jsonl"),
    )
}


def recipe_of(rows: Rows, name: str) -> dict[str, Any]:
    """The recipe of a row, or of the row whose export it rounds."""
    row = rows[name]
    return rows[row["rounds"]]["recipe"] if "rounds" in row else row["recipe"]


def is_control(recipe: dict[str, Any]) -> bool:
    """Whether nothing is shared: *continued* as a training of its own."""
    return recipe.get("plan", {}).get("strategy") == "none"


def tables(lines: list[Line], rows: Rows, base: Base = BASES["mixed7M"]) -> str:
    """A table for each size that has a line, spans last, in the order of the rows."""
    controls = [line for line in lines if is_control(recipe_of(rows, line["row"]))]
    of_spans = [line for line in lines if "spans" in recipe_of(rows, line["row"])]
    of_units = [line for line in lines if line not in controls and line not in of_spans]
    parts = [f"**Nothing shared**\n\n{_table(controls, lines, rows)}"] if controls else []
    parts += [
        f"**{size} %: {int(size) * base.units // 100} of {base.units} {base.unit}**\n\n"
        + _table(of_size := [line for line in of_units if line["size"] == size], lines, rows)
        + _foretold(of_size, lines, rows)
        for size in _sizes(of_units)
    ]
    parts += [
        f"**{size} of {base.layers} layers follow{'s' if size == '1' else ''}**\n\n"
        + _table([line for line in of_spans if line["size"] == size], lines, rows)
        for size in _sizes(of_spans)
    ]
    if any("margins" in line for line in lines):
        parts.append(f"**HellaSwag**\n\n{hellaswag_table(lines, rows)}")
    if missing := [row["what"] for name, row in rows.items() if not _lines_of(lines, name)]:
        parts.append(f"Not trained yet: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def _lines_of(lines: Iterable[Line], row: str) -> list[Line]:
    return [line for line in lines if line["row"] == row]


def _sizes(lines: Iterable[Line]) -> list[str]:
    return sorted({line["size"] for line in lines}, key=int)


def _table(lines: list[Line], every: list[Line], rows: Rows) -> str:
    controls = controls_of(every, rows)
    base = every[0]["bytes"]["base"]
    columns = ["row", "seeds", "untrained", "trained", "above its *continued*", "bytes"]
    with_cache = any("cache" in line for line in lines)
    dense = [f"{base:,}"]
    if with_cache:
        columns.append("cache, bytes a token")
        dense.append(f"{every[0]['cache']['base']:,}")
    out = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    bare = next(
        (line["perplexity"]["base"] for line in every if "base" in line["perplexity"]), None
    )
    untouched = ["the model, not trained on", "", "" if bare is None else f"{bare:.2f}", "", ""]
    out.append(_row([*untouched, *dense]))
    recipes = [recipe_of(rows, line["row"]) for line in lines]
    used = {"distill" in recipe for recipe in recipes}
    for distilled, of_seed in controls.items():
        if of_seed and distilled in used and not any(map(is_control, recipes)):
            name = "*continued*, distilled" if distilled else "*continued*"
            out.append(_row([name, len(of_seed), "", _spread(of_seed.values()), "", *dense]))
    for name in rows:
        found = _lines_of(lines, name)
        if not found:
            continue
        control = controls["distill" in recipe_of(rows, name)]
        cells = [
            _what(rows, name, found),
            len(found),
            _spread(
                line["perplexity"]["direct"] for line in found if "direct" in line["perplexity"]
            ),
            _spread(line["perplexity"]["post"] for line in found),
            _spread(above(found, control), lambda value: f"{value:z.2f} %"),
            f"{max(stored(line['bytes']) for line in found):,}",
        ]
        if with_cache:
            cells.append(f"{max(line['cache']['stored'] for line in found):,}")
        out.append(_row(cells))
    return "\n".join(out)


def _what(rows: Rows, name: str, found: list[Line]) -> str:
    """What a row is; of one that chose the plan of another, which was not trained again, both."""
    others = {line.get("same_as") for line in found} - {None}
    what = rows[name]["what"]
    return what if not others else f"{what}: chose *{rows[min(others)]['what']}*"


def _foretold(lines: list[Line], every: list[Line], rows: Rows) -> str:
    """How well the untrained loss of the plans of one size ranks them as they are when trained.

    Of every plan one training counts, as it is: not rounded, and of seed 0.
    """
    controls = controls_of(every, rows)
    pairs = [
        (line["perplexity"]["direct"], *above([line], controls["distill" in recipe]))
        for line in lines
        if "direct" in line["perplexity"]
        and "same_as" not in line
        and "rounds" not in rows[line["row"]]
        and line["seed"] == 0
        and 0 in controls["distill" in (recipe := recipe_of(rows, line["row"]))]
    ]
    if len(pairs) < FEWEST_PLANS:
        return ""
    before, after = torch.tensor(pairs, dtype=torch.float64).T
    return (
        f"\n\nUntrained and trained rank these {len(pairs)} trainings alike by a Spearman "
        f"correlation of {spearman(before, after):.2f}."
    )


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |".replace("|  |", "| |").replace("|  |", "| |")


def hellaswag_table(lines: list[Line], rows: Rows) -> str:
    """acc_norm and margins of the rows that have them (seed 0), beside *continued* of their kind.

    The interval is a paired bootstrap over the questions (95 %).
    """
    found = [line for line in lines if "margins" in line and line["seed"] == 0]
    controls = {
        "distill" in rows[line["row"]]["recipe"]: np.array(line["margins"])
        for line in found
        if "rounds" not in rows[line["row"]] and is_control(rows[line["row"]]["recipe"])
    }
    items = len(found[0]["margins"])
    out = [
        f"| row ({items} questions) | size | acc_norm | margin, nats per 100 characters | "
        "above its *continued* |",
        "| --- | --- | --- | --- | --- |",
    ]
    order = list(rows)
    for line in sorted(found, key=lambda line: (order.index(line["row"]), int(line["size"]))):
        own = np.array(line["margins"])
        control = controls.get("distill" in recipe_of(rows, line["row"]))
        cells = [rows[line["row"]]["what"], line["size"] if line["size"] != "0" else ""]
        cells += [f"{100 * (own > 0).mean():.1f} %", f"{100 * own.mean():z.2f}"]
        cells.append("" if control is None or control is own else _difference(own - control))
        out.append(_row(cells))
    return "\n".join(out)


def _difference(each: np.ndarray, draws: int = 2000) -> str:
    """The mean of differences of margins, and 95 % of its bootstrap, in nats per 100 characters."""
    drawn = np.random.default_rng(0).integers(len(each), size=(draws, len(each)))
    low, high = np.quantile(100 * each[drawn].mean(axis=1), (0.025, 0.975))
    return f"{100 * each.mean():+z.2f} ({low:+z.2f} to {high:+z.2f})"


def controls_of(lines: list[Line], rows: Rows) -> dict[bool, dict[int, float]]:
    """Perplexity of *continued* for each seed, without a teacher and (True) with one."""
    found: dict[bool, dict[int, float]] = {False: {}, True: {}}
    for line in lines:
        row, values = rows[line["row"]], line["perplexity"]
        if "rounds" in row:
            continue
        of_seed = found["distill" in row["recipe"]]
        if "continued" in values:
            of_seed[line["seed"]] = values["continued"]
        elif is_control(row["recipe"]):
            of_seed[line["seed"]] = values["post"]
    return found


def above(lines: list[Line], control: dict[int, float]) -> list[float]:
    """How far each training lies above *continued* of its seed, in percent."""
    return [
        100 * (line["perplexity"]["post"] / control[line["seed"]] - 1)
        for line in lines
        if line["seed"] in control
    ]


def stored(bytes_: dict[str, int | None]) -> int:
    """The export (compact, by arithmetic its factors, or dense), and the adapter beside it."""
    forms = (bytes_.get(form) for form in ("compact", "factored", "dense"))
    return next(filter(None, forms)) + (bytes_.get("adapter") or 0)


def _spread(values: Iterable[float], show: Callable[[float], str] = "{:.2f}".format) -> str:
    found = list(values)
    if not found:
        return ""
    mean, low, high = map(show, (statistics.fmean(found), min(found), max(found)))
    return mean if low == high else f"{mean} ({low} to {high})"


def filled(page: str) -> str:
    """The text of a page with all tables between their marks."""
    for base in BASES.values():
        begin, end = base.marks
        before, rest = page.split(begin)
        made = tables(base.read(), base.rows(), base)
        page = f"{before}{begin}\n\n{made}\n\n{end}{rest.split(end, 1)[1]}"
    return page


def write() -> None:
    """Bring docs/methods.md up to date."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
