"""The controls beside a plan in its own run: DirectShare as published, and what auto would do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from tests.support import spans_base
from tests.support.spans_base import base_model, ids, read, recipe, reference_loss
from train.common.run_files import ALTERNATIVES_FILE, DIRECTSHARE_FILE
from train.data.calibration import spread_indices
from train.distributed.engines.start import start
from train.planning.search.alternatives import alternatives_lines
from train.planning.search.auto_result import in_words
from train.recipe.recipe import Recipe
from train.stages.pipeline import evaluate, plan, run
from train.stages.run import Run

pytestmark = pytest.mark.usefixtures("sketched")

SPAN = [{"leader": 2, "followers": [3], "share": "attention"}]
UNIT = 3 * spans_base.HEAD_DIM * spans_base.HIDDEN
CALIBRATION = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    spans_base.write_base(folder / "base")
    spans_base.write_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Recipe:
    made = recipe(
        home,
        home / "run",
        plan={
            "strategy": "loss",
            "budget": {"ratio": 0.2},
            "calibration_blocks": CALIBRATION,
            "alternatives": True,
        },
        spans=SPAN,
        train={"steps": 1},
        evaluate={"directshare": True},
    )
    run(made)
    return made


def calibration_ids(made: Recipe) -> torch.Tensor:
    blocks = Run(made, start(made)).blocks[0]
    return torch.stack([blocks[i]["input_ids"] for i in spread_indices(len(blocks), CALIBRATION)])


def test_directshare_saves_as_much_and_is_measured(finished: Recipe, home: Path) -> None:
    folder, base = finished.folder, base_model(home)
    own, published = (SharingPlan.load(folder / n) for n in ("plan.json", DIRECTSHARE_FILE))
    saved = own.savings(base.config).removed_parameters
    assert len(published.ties) == -(-saved // UNIT)  # q, k and v of a head each, rounded up
    assert not published.spans
    summary = read(folder, "summary.json")
    tokens = ids(finished, 4, validation=True)
    wanted = math.exp(reference_loss(base, published, tokens))
    assert summary["directshare"] == {
        "perplexity": pytest.approx(wanted, rel=1e-5),
        "units": len(published.ties),
        "parameters": base.num_parameters() - UNIT * len(published.ties),
    }
    assert summary["perplexity"]["direct"] != pytest.approx(wanted, rel=1e-3)


def test_the_table_has_it_between_continued_and_direct(
    finished: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(finished)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    names = [row[0] for row in rows if len(row) == 2 and row[1].replace(".", "").isdigit()]
    assert names[:4] == ["base", "DirectShare", "direct", "post-trained"]


def test_what_ties_save_is_said_where_they_are_chosen(
    finished: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished.folder / "plan-search.json"
    text = file.read_text()
    for dearer, end in (([], ""), ([[4, 0]], "; some cost more than removal: plan-search.md")):
        file.write_text(json.dumps(json.loads(text) | {"dearer_than_removal": dearer}))
        plan(finished)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ties")]
        assert said == [f"ties      save no cache and no time{end}"]
        assert len(said[0]) <= 80
    file.write_text(text)


def test_alternatives_are_what_auto_chooses(finished: Recipe, home: Path) -> None:
    folder, base = finished.folder, base_model(home)
    savings = SharingPlan.load(folder / "plan.json").savings(base.config)
    value = read(folder, ALTERNATIVES_FILE)
    tokens = calibration_ids(finished)
    dense = reference_loss(base, SharingPlan(), tokens)

    def rise(of: SharingPlan) -> float:
        return math.exp(reference_loss(base, of, tokens) - dense) - 1

    assert value["rise"] == pytest.approx(rise(SharingPlan.load(folder / "plan.json")), abs=1e-5)
    assert [each["counted"] for each in value["alternatives"]] == ["parameters", "cache"]
    for each, objective in zip(value["alternatives"], ("bytes", "cache"), strict=True):
        alone = recipe(
            home,
            home / f"auto-{objective}",
            plan={
                "strategy": "auto",
                "objective": objective,
                "budget": {each["counted"]: each["share"]},
                "calibration_blocks": CALIBRATION,
            },
        )
        plan(alone)
        chosen = SharingPlan.load(alone.folder / "plan.json")
        assert each["plan"] == in_words(chosen, base.config)
        assert each["rise"] == pytest.approx(rise(chosen), abs=1e-5)
        found = chosen.savings(base.config)
        if objective == "bytes":
            assert found.removed_parameters >= savings.removed_parameters
        else:
            assert found.stored_cache <= savings.stored_cache


def test_a_second_start_searches_nothing_again(finished: Recipe) -> None:
    file = finished.folder / ALTERNATIVES_FILE
    text = file.read_text()
    marked = json.loads(text) | {"rise": 0.1234}
    file.write_text(json.dumps(marked))
    run(finished)
    assert json.loads(file.read_text()) == marked
    lines = alternatives_lines(finished.folder)
    file.write_text(text)
    assert lines[0].endswith("this plan +12.3%):")
    assert [line.split("(")[0] for line in lines[1:]] == [
        "  for as many bytes ",
        "  for as much cache ",
    ]


def test_a_plan_without_cache_savings_has_one_alternative(home: Path, tmp_path: Path) -> None:
    budget = {"strategy": "cosine", "budget": {"ratio": 0.2}}
    made = recipe(
        home, tmp_path / "run", plan=budget | {"calibration_blocks": 2, "alternatives": True}
    )
    plan(made)
    (only,) = read(made.folder, ALTERNATIVES_FILE)["alternatives"]
    assert only["counted"] == "parameters"


@pytest.mark.parametrize("strategy", ["auto", "basis", "none"])
def test_alternatives_to_what_chooses_no_units_are_refused(
    strategy: str, home: Path, tmp_path: Path
) -> None:
    section: dict[str, Any] = {"strategy": strategy, "alternatives": True}
    if strategy != "none":
        section["budget"] = {"parameters": "-2%"}
    with pytest.raises(PostshareError, match=r"plan\.alternatives"):
        recipe(home, tmp_path / "run", plan=section)


def test_a_cache_that_cannot_be_read_is_no_budget_that_cannot_be_met(
    home: Path, tmp_path: Path
) -> None:
    section = {"strategy": "cosine", "budget": {"ratio": 0.2}, "alternatives": True}
    made = recipe(home, tmp_path / "run", plan=section | {"calibration_blocks": 2})
    made.folder.mkdir()
    (made.folder / "plan-search-cache.jsonl").write_text("no measurement\n")
    with pytest.raises(PostshareError, match="line 1 is no measurement"):
        plan(made)
    assert not (made.folder / ALTERNATIVES_FILE).exists()
