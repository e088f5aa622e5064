"""docs/ties.md from the lines of tie_study.py: for each size a table of each number of tokens.

python tests/benchmarks/tie_tables.py
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from method_tables import Line, read_lines

from train.evaluation.bootstrap import interval
from train.evaluation.perplexity import BlockLosses

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, LINES = DOCS / "ties.md", DOCS / "ties-smollm2.jsonl"
MARKS = ("<!-- tables: made by tie_tables.py -->", "<!-- /tables -->")
SIZES = {"10": "9 of 90 KV groups", "30": "27 of 90 KV groups"}
"""Whose parameters are saved."""
LEFT_OUT = {"merge": "copy"} | dict.fromkeys(("pull", "residual", "teacher", "reconstruct"), "none")
"""The ways to bring quality back, and what stands where one is left out."""


def tables(lines: list[Line]) -> str:
    """A table of every size and number of tokens that has a line, in this order."""
    parts = []
    for size, what in SIZES.items():
        of_size = [line for line in lines if line["size"] == size]
        for tokens in sorted({line["tokens"] for line in of_size}):
            found = [line for line in of_size if line["tokens"] == tokens]
            title = f"{tokens:,} tokens" if tokens else "nothing trained"
            parts.append(f"**{size} % ({what}), {title}**\n\n{_table(found, lines, tokens)}")
            if changes := _changes(found):
                parts.append(f"**{size} %, {title}: what one change does**\n\n{changes}")
    return "\n\n".join(parts) or "No training has finished yet."


def _table(found: list[Line], every: list[Line], tokens: int) -> str:
    continued = [line for line in every if line["size"] == "0" and line["tokens"] == tokens]
    arms = _by_name([*continued, *found])
    out = ["| what | seeds | untrained | trained | above *continued* (95 %) | bytes |"]
    out.append("| --- | --- | --- | --- | --- | --- |")
    for name, lines in sorted(arms.items(), key=lambda item: trained(item[1])):
        untrained = lines[0]["perplexity"]["untrained"]
        cells = (
            name,
            len(lines),
            "" if untrained is None else f"{untrained:.2f}",
            f"{trained(lines):.2f}",
            above(lines, continued),
            f"{max(line['bytes'] for line in lines):,}",
        )
        out.append(f"| {' | '.join(map(str, cells))} |".replace("|  |", "| |"))
    return "\n".join(out)


def _changes(found: list[Line]) -> str:
    """Each arm against the one that differs from it in one way to bring quality back, left out."""
    arms = _by_name(found)
    out = []
    for axis, left_out in LEFT_OUT.items():
        for lines in sorted(arms.values(), key=trained):
            arm = lines[0]["arm"]
            value = arm.get(axis, left_out)
            other = name_of({"arm": arm | {axis: left_out}})
            if value != left_out and other in arms:
                cells = (value, other, f"{trained(arms[other]):.2f}", f"{trained(lines):.2f}",
                         change(lines, arms[other]))  # fmt: skip
                out.append(f"| {' | '.join(cells)} |")
    if not out:
        return ""
    head = "| with | what | without it | with it | change (95 %) |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *out])


def _by_name(lines: list[Line]) -> dict[str, list[Line]]:
    """The seeds of each arm."""
    arms: dict[str, list[Line]] = {}
    for line in lines:
        arms.setdefault(name_of(line), []).append(line)
    return arms


def name_of(line: Line) -> str:
    """The values of the axes that are neither none nor what changes nothing."""
    arm = line["arm"]
    if arm["share"] == "continued":
        return "*continued*" + (", teacher" if arm["teacher"] != "none" else "")
    return ", ".join(value for value in arm.values() if value not in ("none", "copy"))


def trained(lines: list[Line]) -> float:
    return statistics.fmean(line["perplexity"]["trained"] for line in lines)


def above(lines: list[Line], continued: list[Line]) -> str:
    """:func:`change` from *continued* with as good a teacher."""
    if lines[0]["size"] == "0":
        return ""
    teacher = lines[0]["arm"]["teacher"]
    return change(lines, [line for line in continued if line["arm"]["teacher"] == teacher])


def change(lines: list[Line], control: list[Line]) -> str:
    """How far perplexity lies above that of a control of the same seeds, in percent, with its
    interval over blocks and seeds; nothing where the control lacks one of the seeds."""
    ours = {line["seed"]: line for line in lines}
    theirs = {line["seed"]: line for line in control if line["seed"] in ours}
    if not theirs or theirs.keys() != ours.keys():
        return ""
    runs, reference = (
        [BlockLosses(tuple(of[seed]["nats"]), tuple(of[seed]["predicted"])) for seed in sorted(of)]
        for of in (ours, theirs)
    )
    middle = statistics.fmean(r.perplexity.loss for r in runs)
    middle -= statistics.fmean(r.perplexity.loss for r in reference)
    values = (middle, *interval(runs, reference))
    mean, low, high = (f"{100 * math.expm1(value):.2f}" for value in values)
    return f"{mean} % ({low} to {high})"


def filled(page: str) -> str:
    """The text of the page with the tables between their marks."""
    begin, end = MARKS
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{tables(read_lines(LINES))}\n\n{end}{rest.split(end, 1)[1]}"


def write() -> None:
    """Bring docs/ties.md up to date."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
