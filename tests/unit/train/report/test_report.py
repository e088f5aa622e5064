"""What a report says of a run is what the run's files say; a damaged run gets a report as well."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sa_models.basis import FACTORED, SharedBasis
from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from tests.support.report_run import (
    ABOVE,
    GQA,
    MIXED,
    TIES,
    TOKENS,
    make_run,
    recipe,
    write,
)
from train.cli import main
from train.report.curves import shorten, trend
from train.report.data import read_run
from train.report.page import write_report
from train.report.rivals import find_rivals
from train.report.runs import mismatch, named, recipe_differences
from train.report.svg import DARK, themed
from train.report.tables import pairs
from train.stages.provenance import command, record_start

pytestmark = pytest.mark.usefixtures("sketched")


class Page(HTMLParser):
    """Text of tables and notes, and what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.notes: list[str] = []
        self.figures: list[str] = []
        self.references: list[str] = []
        self._rows: list[list[str]] = []
        self._name = ""
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attributes if k in ("src", "href", "srcset")]
        if tag == "table":
            self._rows, self._name = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
            self._into = self._rows[-1]
        elif tag == "li":
            self.notes.append("")
            self._into = self.notes
        elif tag == "strong":
            self.figures.append("")
            self._into = self.figures
        elif tag == "caption":
            self._into = []

    def handle_data(self, data: str) -> None:
        if self._into is None:
            return
        if self._into:
            self._into[-1] += data
        else:
            self._into.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption" and self._into:
            self._name = self._into[0]
        elif tag == "table":
            self.tables[self._name] = self._rows
        if tag in ("th", "td", "li", "strong", "caption", "p"):
            self._into = None


def page_of(*runs: Path, output: Path | None = None) -> tuple[Page, str]:
    text = write_report(list(runs), output).read_text()
    return Page(text), text


def test_the_numbers_are_those_of_summary_json(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    page, text = page_of(folder)
    summary = json.loads((folder / "summary.json").read_text())
    head, *rows = page.tables["Evaluation"]
    assert head == [
        "model", "perplexity", "vs continued", "95 %", "KV groups tied", "parameters", "bytes",
    ]  # fmt: skip
    by_name = {row[0]: row[1:] for row in rows}
    names = {"base": "base", "continued": "continued", "DirectShare": "direct", "PostShare": "post"}
    assert by_name.keys() == names.keys()
    continued = summary["perplexity"]["continued"]
    for label, name in names.items():
        value, change, spread, heads, parameters, size = by_name[label]
        shared = name in ("direct", "post")
        assert value == f"{summary['perplexity'][name]:.2f}"
        assert parameters == f"{summary['parameters']['stored' if shared else 'base']:,}"
        assert size == f"{summary['bytes']['compact' if shared else 'base']:,}"
        assert heads == ("2/6" if shared else "0")
        if name != "continued":
            assert change == f"{summary['perplexity'][name] / continued - 1:+.1%}"
            exact = f"{math.expm1(ABOVE[name] - ABOVE['continued']):+.1%}"
            assert spread == f"{exact} to {exact}", "every block differs by as much"
    # 4 query heads in 2 KV groups of 8 dimensions: q 16 rows, k and v 8, of 32 numbers.
    saved = 2 * 32 * (16 + 8 + 8)
    assert summary["parameters"]["base"] - summary["parameters"]["stored"] == saved
    ratio = saved / summary["parameters"]["base"]
    words = " ".join(re.sub("<[^>]*>", " ", text).split())
    assert (
        f"{ratio:.1%} fewer bytes of weights, no KV cache saved, decode time not measured; "
        f"{math.expm1(0.06):.1%} higher perplexity than the same training without sharing"
    ) in words
    stock = 3.7 / (1 - ratio)
    assert (
        f"weight bytes {-ratio:+.1%} 3.7 MB, stock {stock:.3g} MB; 2 of 6 KV groups tied" in words
    )
    layers_and_heads = 2 * 3 * 2 * 8  # keys and values of 3 layers of 2 groups of 8 dimensions
    held = 8 * 2048 * layers_and_heads * 4 / 1e6
    cache = f"{layers_and_heads * 4}; 8 x 2,048 tokens: {held:.3g} MB"
    assert f"cache bytes per token as stock {cache} decode time against stock" in words
    exact = f"{math.expm1(0.06):+.1%}"
    assert f"perplexity against continued {exact} 95 %: {exact} to {exact}" in words
    assert "not worth it" in words, "6.2 % for less than a tenth of it"


@pytest.mark.usefixtures("rendered")
def test_it_is_whole_in_itself_and_has_its_pictures(tmp_path: Path) -> None:
    page, text = page_of(make_run(tmp_path / "run"))
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"https?://|@import|<script|url\(", text)
    assert page.figures == [
        "The plan",
        "Similarity of heads",
        "Language-model loss",
        "Loss above continued",
        "Penalty",
        "Distances of the tied pairs",
        "Throughput and memory",
    ]
    assert text.index('<details class="engineering"') < text.index("tokens/s")
    for uri in page.references:
        if uri.startswith("data:image/svg+xml;base64,"):
            svg = base64.b64decode(uri.split(",")[1]).decode()
            drawing = svg.split("</style>", 1)[1]
            assert "prefers-color-scheme:dark" in svg
            assert not any(color in drawing for color in DARK), "each colour is a variable"


def test_throughput_pairs_and_provenance(tmp_path: Path) -> None:
    page, _ = page_of(make_run(tmp_path / "run"))
    rows = {row[0]: row[1:] for row in page.tables["Throughput and memory"]}
    assert rows["post"] == [
        "40", "2,560", "1:20", "32", "0.5 s", "10.0%", "500 MB", "plain, 1 process, cpu",
    ]  # fmt: skip
    versions = dict(page.tables["Versions"][1:])
    assert torch.__version__.startswith(versions["torch"])
    (start,) = page.tables["Commands"][1:]
    assert start[2] == "1 x cpu"


def test_a_pair_is_shown_with_its_way(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write(
        folder / "chance.json",
        {"line": "L", "pairs": [{"target": [1, 0], "source": [0, 1], "corrected": 0.012}]},
    )
    table = pairs(read_run(folder))
    assert table is not None
    assert table.rows[0] == ("1.0", "0.1", "q, k, v", "0.250", "1.2e-02", "1.49", "1")
    assert table.rows[1] == ("2.1", "0.1", "q, k, v", "0.500", "", "1.49", "1")


@pytest.mark.usefixtures("rendered")
def test_spans_isotropy_and_search_are_drawn(tmp_path: Path) -> None:
    mha = LlamaConfig(**{**GQA.to_dict(), "num_key_value_heads": 4})
    folder = make_run(tmp_path / "run", MIXED, mha)
    maps = [[None, 0.5, 0.2], [0.5, None, 0.3], [0.2, 0.3, None]]
    candidates = [
        {"leader": 0, "followers": [1], "loss_rise": 0.1},
        {"leader": 0, "followers": [1, 2], "loss_rise": 0.4},
    ]
    write(
        folder / "spans.json",
        {"candidates": candidates, "isotropy": {"maps": maps, "without_sink": maps}},
    )
    rises = [{"target": [2, 1], "loss_rise": 0.2}, {"target": [1, 0], "loss_rise": None}]
    write(folder / "plan-search.json", {"path": [], "loss_rises": rises, "base_loss": 3.0})
    page, text = page_of(folder)
    assert page.figures[:5] == [
        "The plan",
        "Similarity of heads",
        "Isotropy of layers",
        "Isotropy without the first token",
        "What each layer costs as a follower",
    ]
    assert "What each change costs alone" in page.figures
    assert "less KV cache" in text
    assert page.tables["Evaluation"][0][4] == "cache"
    # Strategy auto keeps several searches: drawn is the one whose plan was chosen.
    candidates = [{"name": "a"}, {"name": "b", "loss_rises": rises}]
    auto = {"search": "auto", "base_loss": 3.0, "candidates": candidates}
    for chosen, drawn in (("b", True), ("a", False)):
        write(folder / "plan-search.json", auto | {"chosen": chosen})
        page, text = page_of(folder)
        assert ("What each change costs alone" in page.figures) == drawn
        assert "plan-search.json" not in text


def test_samples_are_shown_below_what_was_given(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    passages = [{"prompt": "def main", "text": "():\n    <b>pass</b>"}]
    models = {"base": ["\n#\n#"], "post": [" (x)"], "unknown": ["y"]}
    write(folder / "samples.json", {"passages": passages, "models": models})
    page, text = page_of(folder)
    assert page.tables["Sample 1"] == [
        ["given", "def main"],
        ["the text itself", "(): \u21b5 <b>pass</b>"],
        ["base", "\u21b5 # \u21b5 #"],
        ["PostShare", "(x)"],
    ]
    assert "<b>" not in text
    write(folder / "samples.json", {"passages": passages, "models": {"base": []}})
    page, _ = page_of(folder)
    assert page.notes == ["samples.json is not what this version writes; it is left out"]
    assert "Sample 1" not in page.tables


@pytest.mark.usefixtures("rendered")
def test_a_shared_basis_is_drawn(tmp_path: Path) -> None:
    ranks = dict.fromkeys(FACTORED, (6, 5))
    folder = make_run(tmp_path / "run", SharingPlan(basis=SharedBasis(2, **ranks)))
    page, text = page_of(folder)
    assert page.figures[0] == "The plan"
    drawing = base64.b64decode(
        next(uri for uri in page.references if "svg" in uri).split(",")[1]
    ).decode()
    # q of layers 0 and 1: 2 x 32 rows of 32; 6 ranks of 32 + 64 numbers.
    assert f"rank 6: {6 * (32 + 64) / (2 * 32 * 32):.0%}" in drawing
    assert "Similarity of heads" in page.figures, "from the SVG of the plan stage"
    assert "image/png" not in text


# --- damage ---------------------------------------------------------------------------------------


def test_a_killed_run_has_a_report_of_what_there_is(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("summary.json", "evaluation-blocks.json", "result.json"):
        (folder / name).unlink()
    rows = (folder / "metrics.jsonl").read_text()
    lines = rows.splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:25]) + lines[25][:40])
    data = read_run(folder)
    assert len(data.trainings["post"].steps) == 25
    page, text = page_of(folder)
    assert page.notes[0] == "post-training is not finished: step 25 of 40"
    assert page.notes[1].startswith("the models have not been evaluated yet")
    assert page.notes[2].startswith("metrics.jsonl: the last line is broken, as a killed run")
    assert "Evaluation" not in page.tables
    assert "Language-model loss" in page.figures
    assert 'class="verdict"' not in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    recipe(folder).save(folder / "recipe.yaml")
    page, _ = page_of(folder)
    assert (page.figures, list(page.tables)) == ([], [])
    assert len(page.notes) == 1


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("summary.json", "{", "summary.json cannot be read"),
        ("summary.json", '{"perplexity": {}}', "summary.json is not what this version writes"),
        ("evaluation-blocks.json", '{"base": {"nats": [1]}}', "evaluation-blocks.json is not"),
        ("plan.json", '{"version": 7}', "plan.json is left out"),
        ("pairs.jsonl", '{"step": 1, "distance": [[1], [1, 2]]}\n', "pairs.jsonl is not what"),
        ("pairs.jsonl", "nonsense\n", "pairs.jsonl: the last line is broken"),
        ("metrics.jsonl", "[1]\n{}\n", "metrics.jsonl: 2 of 2 lines are no rows"),
        ("provenance.json", "[]", "provenance.json is not what this version writes"),
        ("spans.json", "\x00", "spans.json cannot be read"),
        ("recipe.yaml", "name: <b>old</b>\nwas: here\n", "the recipe is shown as it is"),
    ],
)
def test_what_is_damaged_is_said_and_left_out(
    tmp_path: Path, name: str, content: str, note: str
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(content)
    page, text = page_of(folder)
    assert [line for line in page.notes if note in line], page.notes
    assert page.figures
    assert "<b>" not in text, "what a file says is text, never markup"


@pytest.mark.parametrize(
    ("section", "key"),
    [("heads", "removed"), ("parameters", "adapter"), ("bytes", "adapter"), ("structure", "basis")],
)
def test_a_summary_of_an_earlier_version(section: str, key: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    del summary[section][key]
    write(folder / "summary.json", summary)
    page, _ = page_of(folder)
    assert page.notes == [
        "summary.json is of an earlier version, and is left out; `postshare evaluate` with the "
        "run's recipe writes it anew"
    ]


def test_the_shape_comes_from_an_export_where_no_start_was_recorded(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "provenance.json").unlink()
    assert read_run(folder).layout is None
    assert "the plan is not drawn" in read_run(folder).notes[0]
    write(folder / "weights/config.json", GQA.to_dict())
    layout = read_run(folder).layout
    assert layout is not None
    assert (layout.layers, layout.units, layout.heads_per_unit) == (3, 2, 2)


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument, part in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path, "is no run folder (it has no recipe.yaml)"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["report", str(argument)])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1
    folder = make_run(tmp_path / "run")
    with pytest.raises(PostshareError, match="named twice"):
        write_report([folder, folder / "continued" / ".."])
    with pytest.raises(PostshareError, match="cannot be written"):
        write_report([folder], tmp_path / "no" / "report.html")


def test_the_command_prints_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        main(["report", str(folder)])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"report    {folder}/report.html\n"
    assert not list(folder.glob("*.tmp"))


# --- several runs ---------------------------------------------------------------------------------


def test_runs_side_by_side(tmp_path: Path) -> None:
    train = {"steps": 40, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3}
    one = make_run(tmp_path / "a" / "run")
    two = make_run(tmp_path / "b" / "run", above={**ABOVE, "post": -0.02}, train=train)
    page, _ = page_of(one, two, output=tmp_path / "report.html")
    assert page.notes == []
    rows = {row[0]: row[1:] for row in page.tables["Side by side"][1:]}
    loss = sum(n * t for n, t in zip((3.0, 3.2, 3.1, 2.9), TOKENS, strict=True)) / sum(TOKENS)
    assert rows["a/run"][:3] == [f"{math.exp(loss - 0.04):.2f}", "+6.2%", "+6.2% to +6.2%"]
    assert rows["b/run"][:3] == [f"{math.exp(loss - 0.02):.2f}", "+8.3%", "+8.3% to +8.3%"]
    summary = json.loads((one / "summary.json").read_text())
    ratio = summary["parameters"]["stored"] / summary["parameters"]["base"]
    assert rows["a/run"][3:] == [
        f"3,700,000 ({ratio - 1:+.1%})", "as stock", "not measured", "not worth it",
    ]  # fmt: skip
    assert page.tables["What differs in the recipes"] == [
        ["key", "a/run", "b/run"],
        ["train.batch_size", "4", "8"],
    ]
    assert page.figures[:2] == ["Quality against bytes", "Language-model loss"]


def test_perplexities_of_other_text_are_not_compared(tmp_path: Path) -> None:
    same = make_run(tmp_path / "same")
    other = make_run(tmp_path / "other")
    blocks = json.loads((other / "evaluation-blocks.json").read_text())
    blocks["base"]["nats"][2] += 1.0
    write(other / "evaluation-blocks.json", blocks)
    problem = mismatch(named([read_run(same), read_run(other)]))
    assert problem is not None
    assert problem.startswith("same and other have other bases or other held-out text")
    assert mismatch(named([read_run(same), read_run(same)])) is None
    (other / "evaluation-blocks.json").unlink()
    problem = mismatch(named([read_run(same), read_run(other)]))
    assert problem is not None
    assert problem.startswith("other: no evaluation-blocks.json")
    assert recipe_differences(named([read_run(same), read_run(other)])) is None


# --- controls -------------------------------------------------------------------------------------


def make_comparison(
    folder: Path, control: str = "random-pairs", shared: SharingPlan = TIES, **sections: Any
) -> None:
    """`postshare compare` of two seeds: the recipe, and a control that is 0.03 worse."""
    for name, post in (("recipe", -0.04), (control, -0.01)):
        for seed in (0, 1):
            above = {**ABOVE, "post": post + 0.001 * seed}
            made = {**sections, "seed": seed}
            make_run(folder / name / f"seed-{seed}", shared, above=above, **made)
    row = {"what": "", "parameters": 1000, "bytes": 3_000_000, "perplexities": [1, 2]}
    rows = [
        {**row, "name": "continued", "loss": 3.0, "perplexity": 20.0, "above_reference": 0.0},
        {**row, "name": "recipe", "loss": 3.06, "perplexity": 21.0, "above_reference": 0.06},
        {**row, "name": control, "loss": 3.1, "perplexity": 22.0, "above_reference": 0.1},
    ]
    for one in rows:
        one["above_reference_interval"] = [0.05, 0.07]
    write(folder / "comparison.json", rows)


def test_random_pairs_of_a_comparison_beside_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_comparison(tmp_path / "run-compare")
    page, text = page_of(folder)
    exact = f"{math.expm1(-0.03):+.1%}"
    assert f"{exact} to {exact}" in text
    assert [row[0] for row in page.tables["Against its controls"][1:]] == [
        "continued", "recipe", "random-pairs",
    ]  # fmt: skip
    assert page.tables["Against its controls"][2][2:5] == ["21.00", "+6.2%", "+5.1% to +7.3%"]
    assert page.figures[0] == "Quality against bytes"
    inside, notes = find_rivals(tmp_path / "run-compare/recipe/seed-1", recipe(folder, seed=1))
    assert inside is not None
    assert notes == []


def test_where_nothing_is_tied_chance_is_a_random_removal(tmp_path: Path) -> None:
    removals = SharingPlan(removed=((0, 1), (2, 0)))
    folder = make_run(tmp_path / "run", removals)
    _, text = page_of(folder)
    assert "random removals" not in text, "what was not measured is not shown"
    make_comparison(tmp_path / "run-compare", "random-pairs", removals)
    assert "random removals" not in page_of(folder)[1]
    shutil.rmtree(tmp_path / "run-compare")
    make_comparison(tmp_path / "run-compare", "pruned-random", removals)
    _, text = page_of(folder)
    exact, words = f"{math.expm1(-0.03):+.1%}", " ".join(re.sub("<[^>]*>", " ", text).split())
    assert f"perplexity against random removals {exact} 95 %: {exact} to {exact}" in words
    assert "random pairs" not in text


def test_a_comparison_of_another_recipe_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    make_comparison(tmp_path / "run-compare", plan={"budget": {"ratio": 0.2}})
    page, _ = page_of(folder)
    assert page.notes == ["the comparison in run-compare is of another recipe; it is left out"]
    assert "Against its controls" not in page.tables


# --- curves, pictures, size -----------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "points"), [(1, 400), (7, 3), (400, 400), (1003, 400)])
def test_a_shortened_curve_has_the_means_and_extremes_of_its_rows(rows: int, points: int) -> None:
    generator = np.random.default_rng(rows)
    x, y = np.arange(1.0, rows + 1), generator.normal(size=rows)
    curve = shorten(x, y, points)
    assert len(curve.x) == min(points, rows)
    assert curve.x[-1] == rows
    assert np.all(np.diff(curve.x) > 0)
    counts = np.diff(np.concatenate([[0], curve.x]))
    assert np.isclose((curve.mean * counts).sum(), y.sum())
    assert counts.max() - counts.min() <= 1
    begin = 0
    for k, count in enumerate(counts.astype(int)):
        part = y[begin : begin + count]
        assert (curve.low[k], curve.high[k]) == (part.min(), part.max())
        begin += count


def test_rows_without_a_value_are_left_out_of_a_curve() -> None:
    curve = shorten(np.arange(4.0), np.array([np.nan, 1.0, np.nan, 3.0]))
    assert (curve.x.tolist(), curve.mean.tolist()) == ([1.0, 3.0], [1.0, 3.0])
    assert len(shorten(np.arange(2.0), np.full(2, np.nan)).x) == 0


def test_a_trend_is_the_mean_of_the_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=60)
    half = 2  # a twelfth of 60 is 5
    naive = [values[max(0, i - half) : i + half + 1].mean() for i in range(60)]
    assert np.allclose(trend(values), naive)
    assert trend(np.array([4.0])).tolist() == [4.0]


def test_colours_become_variables_and_references_stay() -> None:
    svg = '<svg><defs><path id="m0072b2aa"/></defs><use href="#m0072b2aa" fill="#0072b2"/></svg>'
    made = themed(svg)
    assert '<use href="#m0072b2aa" fill="var(--c0072b2)"/>' in made
    assert f"--c0072b2:{DARK['#0072b2']}" in made


@pytest.mark.usefixtures("rendered")
def test_ten_thousand_steps_fit_into_five_megabytes_and_ten_seconds(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=10_000)
    began = time.process_time()
    file = write_report([folder])
    assert time.process_time() - began < 10
    assert file.stat().st_size < 5_000_000
    assert len(read_run(folder).trainings["post"].steps) == 10_000


# --- provenance -----------------------------------------------------------------------------------


def test_every_start_is_recorded(tmp_path: Path) -> None:
    for processes in (1, 4):
        record_start(tmp_path, GQA, processes, torch.device("cpu"))
    value = json.loads((tmp_path / "provenance.json").read_text())
    assert value["base"] == {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    assert [start["processes"] for start in value["starts"]] == [1, 4]
    assert {"python", "torch", "transformers", "postshare"} <= value["starts"][0]["versions"].keys()
    layout = SharingPlan(kv_heads=1).layout(GQA)
    SharingPlan(kv_heads=1).save(tmp_path / "plan.json")
    recipe(tmp_path).save(tmp_path / "recipe.yaml")
    assert read_run(tmp_path).layout == layout
    (tmp_path / "provenance.json").write_text("[]")
    with pytest.raises(PostshareError, match="delete it"):
        record_start(tmp_path, GQA, 1, torch.device("cpu"))


def test_the_command_is_what_was_typed() -> None:
    typed = ["/opt/x/bin/postshare", "run", "demo", "plan.share=[q, k]"]
    assert command(typed) == "postshare run demo 'plan.share=[q, k]'"
    assert command(["/opt/x/train/__main__.py", "r.yaml"]) == "python -m train r.yaml"


def test_ties_are_those_of_the_plan(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "run")).plan == TIES
