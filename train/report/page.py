"""The page of a report: what it shows, laid out by the templates beside this file.

`data` reads the run folder, `verdict`, `tables`, `plots` and `runs` say what is shown, `svg` makes
pictures that follow the page's colours, and the templates beside this file lay it out. The file is
whole in itself: it loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sa_models.atomic_files import write_text
from sa_models.errors import PostshareError
from train.evaluation.summary import model_names
from train.report import plots, runs, tables, verdict
from train.report.data import RunData, read_run, require_run
from train.report.rivals import Rivals, find_rivals
from train.report.svg import Picture, render

REPORT_FILE = "report.html"
TEMPLATE = "page.html.jinja"
Section = tuple[str, Iterable[Picture], Sequence[tables.Table | None]]
"""Its title, and what it shows."""


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or the one that compares several; returns its path.

    Args:
        output: file to write; by default ``report.html`` in the folder of the one run, or in the
            working directory for several.

    Raises:
        PostshareError: one of the folders is no run folder, or is named twice; the file cannot be
            written.
    """
    for folder in folders:
        require_run(folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise PostshareError("a run is named twice; name each run once")
    if len(folders) == 1:
        target, page = output or folders[0] / REPORT_FILE, run_page(read_run(folders[0]))
    else:
        target, page = output or Path(REPORT_FILE), runs_page([read_run(f) for f in folders])
    if not target.name or target.is_dir():
        raise PostshareError(f"--output: {target} is a folder; give a file, such as report.html")
    try:
        write_text(target, page)
    except OSError as error:
        raise PostshareError(
            f"{target} cannot be written ({error.strerror}); give another file with --output"
        ) from error
    return target


def run_page(data: RunData) -> str:
    """The HTML of one run."""
    rivals, notes = find_rivals(data.folder, data.recipe)
    names = {"continued": "continued", "post": "post-training", "heal": "healing"}
    if data.summary is not None:
        names["post"] = model_names(data.summary)["post"]
    judged = verdict.judge(data, rivals)
    sections: list[Section] = [
        (
            "Quality",
            _rival_picture(rivals),
            (
                tables.evaluation(data),
                tables.against_controls(rivals),
                tables.formats(data),
                tables.tasks(data),
            ),
        ),
        ("The same text, before and after", (), (*tables.samples(data),)),
        (
            "Plan",
            plots.plan_pictures(data),
            (tables.stock(data), tables.basis(data), tables.pairs(data)),
        ),
        ("Training", plots.training_pictures(data, names), ()),
    ]
    engineering: list[Section] = [
        ("Engineering", plots.system_pictures(data, names), tables.engineering(data))
    ]
    return _page(
        title=data.name,
        subtitle=_subtitle(data),
        verdict=judged,
        notes=[*data.notes, *notes],
        sections=_laid_out(sections),
        engineering=_laid_out(engineering),
        recipe=data.recipe_text,
    )


def runs_page(every: Sequence[RunData]) -> str:
    """The HTML that compares runs."""
    named = runs.named(every)
    notes = [f"{run.label}: {note}" for run in named for note in run.data.notes]
    if (problem := runs.mismatch(named)) is not None:
        notes.insert(0, problem)
    sections: list[Section] = [
        ("Quality and size", (), (runs.side_by_side(named),)),
        ("Curves", runs.pictures(named), ()),
        ("Recipes", (), (runs.recipe_differences(named),)),
    ]
    return _page(
        title=f"{len(named)} runs",
        subtitle=", ".join(run.label for run in named),
        verdict=None,
        notes=notes,
        sections=_laid_out(sections),
        engineering=[],
        recipe=None,
    )


def _rival_picture(rivals: Rivals | None) -> list[Picture]:
    if rivals is None:
        return []
    marks = [
        (row["bytes"] / 1e6, row["perplexity"], row["name"]) for row in rivals.rows if row["bytes"]
    ]
    return [
        Picture(
            "Quality against bytes",
            render(runs.draw_marks, marks),
            "Perplexity against megabytes of weights of the recipe and its controls",
            "The line is the Pareto front: no other point is better in both.",
            wide=True,
        )
    ]


def _subtitle(data: RunData) -> str:
    if data.recipe is None:
        return str(data.folder)
    section = data.recipe.plan
    what = [data.recipe.model.path]
    if section.strategy != "none":
        what.append(f"plan: {section.strategy}")
    if data.recipe.spans is not None:
        what.append(f"spans: {data.recipe.spans.strategy}")
    return ", ".join(what)


def _laid_out(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """What is there; a section without anything is left out."""
    laid = []
    for title, pictures, shown in sections:
        section = {
            "title": title,
            "pictures": list(pictures),
            "tables": [table for table in shown if table is not None],
        }
        if section["pictures"] or section["tables"]:
            laid.append(section)
    return laid


def _page(**values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("train.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(TEMPLATE).render(made=made, **values)
