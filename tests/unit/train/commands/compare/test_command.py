"""`postshare compare` on the demo base: real runs, two steps long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.weights.config_file import read_config
from tests.support import demo_runs, spans_base
from train.commands.compare import command as comparing
from train.commands.compare.controls import CONTROLS, Target, variant
from train.common.run_files import COMPARED_RECIPE, PLAN_FILE
from train.evaluation.summary import read_block_losses
from train.models.base_model import base_folder
from train.planning.basis import basis_plan
from train.planning.problem import PlanProblem
from train.recipe.recipe import Recipe
from train.stages import precision
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.usefixtures("sketched")

torch.set_num_threads(1)


def recipe(folder: Path, **sections: Any) -> Recipe:
    return demo_runs.recipe(folder, **({"evaluate": {"blocks": 6}} | sections))


@pytest.fixture
def target(tmp_path: Path) -> Target:
    made = recipe(tmp_path / "plan")
    config = read_config(base_folder(made.model))
    from sa_models.weights.safetensors_folder import WeightsFolder
    from train.planning.find import find_ties

    weights = WeightsFolder(base_folder(made.model))
    plan, _ = find_ties(PlanProblem(made.plan, weights.config), weights)
    return Target(plan, config, 2)


def test_all_runs_compute_in_what_the_first_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    own = recipe(tmp_path / "run", train={**section, "precision": "auto"})
    started: list[Recipe] = []
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(comparing.pipeline, "stages", started.append)
    monkeypatch.setattr(comparing, "_conclude", lambda *_: None)
    monkeypatch.setattr(comparing.engines, "shutdown", lambda: None)
    comparing.compare(own, 2, ["random-pairs"])
    assert [made.train.precision for made in started] == 4 * ["bf16"]


def test_pruning_is_reconstructed_where_the_recipe_is(tmp_path: Path, target: Target) -> None:
    section = {"reconstruct": True, "calibration_blocks": 7, "heal_steps": 2, "merge": "mean"}
    own = recipe(tmp_path / "run", materialize=section)
    for name in ("pruned-random", "pruned-magnitude", "pruned-gradient"):
        made = variant(CONTROLS[name], own, target, 0, str(tmp_path / name))
        assert made is not None
        kept = made.materialize
        assert (kept.reconstruct, kept.calibration_blocks, kept.merge) == (True, 7, "copy")


def test_controls_have_no_gguf_file(tmp_path: Path, target: Target) -> None:
    own = recipe(tmp_path / "run", export={"formats": ["compact", "gguf"], "gguf": "q8_0"})
    kept = {
        "pooled": ("dense",),
        "pruned-random": ("compact",),
        COMPARED_RECIPE: ("compact", "gguf"),
    }
    for name, formats in kept.items():
        made = variant(CONTROLS[name], own, target, 0, str(tmp_path / name))
        assert made is not None
        assert made.export.formats == formats
        assert made.export.gguf == ("q8_0" if "gguf" in formats else None)


def test_where_auto_shares_bases_the_control_is_auto_without_them(
    tmp_path: Path, target: Target
) -> None:
    section = {"strategy": "auto", "budget": {"bytes": "-8%"}, "calibration_blocks": 3}
    own = recipe(tmp_path / "run", plan=section)
    shared = Target(basis_plan(PlanProblem(own.plan, target.config)), target.config, 2)
    made = variant(CONTROLS["heads"], own, shared, 0, str(tmp_path / "heads"))
    assert made is not None
    assert made.plan == own.plan.model_copy(update={"basis": False})
    assert made.materialize == own.materialize
    assert variant(CONTROLS["basis"], own, shared, 0, str(tmp_path / "basis")) is None
    assert variant(CONTROLS["heads"], own, target, 0, str(tmp_path / "heads")) is None


@pytest.mark.parametrize(
    "name", [name for name in CONTROLS if name not in ("heads", "drop-attention-cache")]
)
@pytest.mark.parametrize("heal", [0, 3])
def test_every_control_takes_the_same_steps_and_no_more_bytes(
    name: str, heal: int, tmp_path: Path, target: Target
) -> None:
    own = recipe(tmp_path / "run", materialize={"heal_steps": heal} if heal else {})
    target = Target(target.plan, target.config, 2 + heal)
    made = variant(CONTROLS[name], own, target, 1, str(tmp_path / name))
    assert made is not None
    assert made.train.steps is not None
    assert made.train.steps + made.materialize.heal_steps == 2 + heal
    assert made.seed == 1
    assert made.evaluate.continued == (name == COMPARED_RECIPE)
    assert (made.data, made.model, made.train.batch_size) == (own.data, own.model, 2)
    if name.startswith("pruned"):
        assert made.plan.budget is not None
        assert made.plan.budget.heads is not None
        # 19 of 64 heads without q, k, v are as large as 14.25 heads without q, k, v and o.
        assert made.plan.budget.heads == 15


def test_whole_layers_are_dropped_at_the_recipes_bytes_and_at_its_cache(
    tmp_path: Path, target: Target
) -> None:
    """The demo base: 8 layers of 8 units, of which two layers and 4 units more are removed."""
    own = recipe(tmp_path / "run")
    config, layout = target.config, target.layout
    removed = tuple((layer, unit) for layer in (1, 2, 3) for unit in range(layout.units))
    plan = SharingPlan(removed=removed[:20])
    found: dict[str, Recipe | None] = {}
    for name in ("drop-attention", "drop-attention-cache"):
        found[name] = variant(CONTROLS[name], own, Target(plan, config, 2), 0, str(tmp_path / name))
        made = found[name]
        assert made is not None
        assert (made.plan.strategy, made.plan.action) == ("loss", "drop")
        assert (made.train.steps, made.materialize.heal_steps) == (0, 2)
        space = PlanProblem(made.plan, config).space
        assert space.needed > 2 * space.drop_saves  # 20 units are more than two layers
        assert space.needed <= 3 * space.drop_saves
    saved = plan.savings(config)
    cache = PlanProblem(found["drop-attention-cache"].plan, config).space
    assert cache.needed == saved.base_cache - saved.stored_cache
    size = PlanProblem(found["drop-attention"].plan, config).space
    assert size.needed == saved.removed_parameters
    none = variant(CONTROLS["drop-attention-cache"], own, target, 0, str(tmp_path / "none"))
    assert none is None, "ties save no cache"
    most = tuple((layer, unit) for layer in range(1, 8) for unit in range(layout.units))
    more = Target(SharingPlan(removed=((0, 0), *most)), config, 2)
    for name in ("drop-attention", "drop-attention-cache"):
        assert variant(CONTROLS[name], own, more, 0, str(tmp_path / name)) is None


@pytest.mark.more
def test_compares_and_goes_on_where_it_stood(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = {"plan": {"budget": {"ratio": 0.3}}, "evaluate": {"blocks": 6, "continued": True}}
    made = spans_base.recipe(home, tmp_path / "run", train={"steps": 2}, **section)
    names = ["random-pairs", "pooled"]
    comparing.compare(made, 2, names)
    out = capsys.readouterr().out
    folder = tmp_path / "run-compare"
    rows = {row["name"]: row for row in json.loads((folder / "comparison.json").read_text())}
    assert list(rows) == ["base", "continued", "direct", "recipe", "random-pairs", "pooled"]
    for name, row in rows.items():
        assert row["name"] in out
        assert len(row["perplexities"]) == (1 if name in ("base", "direct") else 2)
    assert (folder / "comparison.png").is_file()
    page = (folder / "recipe" / "seed-0" / "report.html").read_text()
    assert "Against its controls" in page, "written anew, with what it is compared with"
    # Numbers are those of the runs' own evaluations, and runs differ in their data order.
    for seed in range(2):
        run = folder / "recipe" / f"seed-{seed}"
        measured = json.loads((run / "evaluation.json").read_text())["models"]
        assert rows["recipe"]["perplexities"][seed] == measured["post"]["perplexity"]
        assert rows["continued"]["perplexities"][seed] == measured["continued"]["perplexity"]
        losses = read_block_losses(run)["post"]
        assert losses.perplexity.loss == pytest.approx(measured["post"]["loss"], rel=1e-12)
    assert len(set(rows["recipe"]["perplexities"])) == 2
    sources = [
        SharingPlan.load(folder / "random-pairs" / f"seed-{k}" / PLAN_FILE) for k in range(2)
    ]
    assert sources[0] != sources[1]
    assert rows["pooled"]["parameters"] < rows["base"]["parameters"]
    for run in folder.glob("*/seed-*"):
        trained = run / "metrics.jsonl"
        assert read_rows(trained)[-1]["step"] == 2

    # Started again, nothing is trained and nothing evaluated.
    monkeypatch.setattr("train.training.loop._train", None)
    monkeypatch.setattr("train.evaluation.summary.block_losses", None)
    comparing.compare(made, 2, names)
    again = json.loads((folder / "comparison.json").read_text())
    assert {row["name"]: row for row in again} == rows


def test_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    with pytest.raises(PostshareError, match=r"no control 'prune'; known: .*pruned-random"):
        comparing.compare(made, 1, ["prune"])
    with pytest.raises(PostshareError, match=r"shares nothing"):
        comparing.compare(recipe(tmp_path / "run", plan={"strategy": "none"}), 1)
    epochs = made.train.model_dump() | {"steps": None, "epochs": 1.0}
    with pytest.raises(PostshareError, match=r"set train\.steps"):
        comparing.compare(recipe(tmp_path / "run", train=epochs), 1)
    idle = made.train.model_dump() | {"steps": 0}
    with pytest.raises(PostshareError, match=r"nothing is trained"):
        comparing.compare(recipe(tmp_path / "run", train=idle), 1)
    assert not (tmp_path / "run-compare").exists()
