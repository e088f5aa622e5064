"""Benchmarks rot unseen: each must at least import what it measures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("bench_*.py")))
def test_a_benchmark_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop(name, None)
    assert callable(importlib.import_module(name).measure)


def line(row: str, seed: int, post: float, **more: float) -> dict[str, Any]:
    """A training of docs/methods.jsonl."""
    sizes = {"base": 1000, "compact": 900, "adapter": 50 if row == "ours" else None}
    return {
        "row": row, "size": "30", "seed": seed, "bytes": sizes,
        "perplexity": {"base": 60.0, "post": post, **more},
    }  # fmt: skip


def test_the_tables_of_methods_are_those_of_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    made = importlib.import_module("method_tables")
    rows = {
        "ours": {"what": "ours", "recipe": {"distill": {}}},
        "plain": {"what": "plain", "recipe": {}},
    }
    table = made.tables(
        [
            line("ours", 0, 51.0, continued=50.0, direct=70.0),
            line("ours", 1, 52.5, continued=50.0, direct=72.0),
            line("plain", 0, 55.0),
        ],
        rows,
    )
    assert "| the model, not trained on | | 60.00 | | | 1,000 |" in table
    assert "| *continued*, distilled | 2 | | 50.00 (50.00 to 50.00) | | 1,000 |" in table
    ours = "| ours | 2 | 71.00 (70.00 to 72.00) | 51.75 (51.00 to 52.50) | "
    assert ours + "3.50 % (2.00 % to 5.00 %) | 950 |" in table
    assert "| plain | 1 | | 55.00 | | 900 |" in table  # no *continued* of its own objective
    page = made.PAGE.read_text(encoding="utf-8")
    assert made.filled(page) == page, "run tests/benchmarks/method_tables.py"
    for base in made.BASES.values():
        assert {row["row"] for row in base.read()} == set(base.rows()), base.name


def test_the_picture_of_methods_is_of_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    made = importlib.import_module("method_picture")
    lines = [line("ours", 0, 51.0), line("ours", 1, 52.5), line("plain", 0, 55.0)]
    lines[1] |= {"bytes": {"base": 1000, "compact": 870, "adapter": None}}
    lines.append({**lines[0], "size": "50", "bytes": {"base": 1000, "compact": 700}})
    assert made.points("ours", lines, {0: 50.0, 1: 50.0}) == [
        pytest.approx((5, 3.5)),
        pytest.approx((30, 2)),
    ]
    for base in made.BASES.values():
        picture = base.picture.read_text(encoding="utf-8")
        assert made.described(base) in picture, "run tests/benchmarks/method_picture.py"
        for name, (label, _, _) in made.SHOWN.items():
            assert (f">{label}<" in picture) == (name in base.rows()), (base.name, label)
