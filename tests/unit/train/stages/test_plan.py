"""The plan stage: what it holds in memory, and plans that are there already."""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from sa_models import SharingPlan
from sa_models.basis import basis_of
from sa_models.errors import PostshareError
from sa_models.heads import HeadLayout
from sa_models.savings import llama_parameters
from sa_models.spans import AttentionSpan
from tests.support.spans_base import base_model, read, recipe, write_base, write_text
from train.planning.search import auto_report
from train.recipe.recipe import Recipe
from train.stages import plan as stage
from train.stages.pipeline import export, plan, run


def living() -> int:
    """Models that are in memory, whoever holds them."""
    return sum(issubclass(type(found), LlamaForCausalLM) for found in gc.get_objects())


def test_no_model_is_held_that_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another part of the stage has worked with is gone, though compact models refer to
    themselves and the collector is not called by itself."""
    write_base(tmp_path / "base")
    write_text(tmp_path / "text.jsonl")
    saved = 2 * 8 * 32 * 4 + 2 * 4 * 8 * 32  # a span, and two units
    of = recipe(
        tmp_path,
        tmp_path / "run",
        plan={
            "strategy": "auto",
            "budget": {"bytes": f"-{100 * saved / llama_parameters(base_model(tmp_path).config)}%"},
            "calibration_blocks": 2,
        },
        spans=[{"leader": 2, "followers": [3]}],
        materialize={"reconstruct": True, "calibration_blocks": 2},
        train={"steps": 0},
    )
    counts: dict[str, set[int]] = {}

    def watch(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts.setdefault(name, set()).add(living() - before)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    for name in ("load_dense", "search_auto", "compare_rebuilt", "time_front"):
        watch(stage, name)
    watch(auto_report, "decode_time")
    monkeypatch.setattr("train.evaluation.decode_time.SECONDS", 0.0)
    gc.collect()
    before = living()
    gc.disable()
    try:
        plan(of)
    finally:
        gc.enable()
    assert counts == {
        "load_dense": {0},  # for the search, for every plan that is reconstructed, for the times
        "search_auto": {1},
        "compare_rebuilt": {0},
        "time_front": {1},
        "decode_time": {1},
    }


def planned(home: Path, folder: Path, **sections: Any) -> Recipe:
    """Two removed units, untrained."""
    plan = {"strategy": "loss", "action": "remove", "budget": {"heads": 2}}
    made = {"plan": plan | {"calibration_blocks": 2}, "train": {"steps": 0}} | sections
    return recipe(home, folder, **made)


def test_a_run_keeps_the_plan_file_that_it_is_given_in_its_own_folder(
    home: Path, tmp_path: Path
) -> None:
    made = planned(home, tmp_path / "run")
    plan(made)
    file = made.folder / "plan.json"
    found = file.read_bytes()
    given = planned(home, tmp_path / "run", plan={"strategy": "file", "path": str(file)})
    plan(given)
    assert file.read_bytes() == found
    assert not (made.folder / "plan-search.json").exists()  # that was of the other recipe


def test_formats_that_a_plan_found_earlier_cannot_have_are_refused(
    home: Path, tmp_path: Path
) -> None:
    made = planned(home, tmp_path / "run")
    plan(made)
    SharingPlan(spans=(AttentionSpan(2, (3, 4)),)).save(made.folder / "plan.json")  # as auto may
    dense = planned(home, tmp_path / "run", export={"formats": ["dense"]})
    for command in (plan, export):
        with pytest.raises(PostshareError, match="spans have no dense form"):
            command(dense)
    plan(made)


FILES = {
    "merge": (SharingPlan(removed=((1, 0),)), {"materialize": {"merge": "mean"}}),
    "reconstruct": (None, {"materialize": {"reconstruct": True}}),
    "alternatives": (None, {"plan": {"alternatives": True}}),
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_plan_file_leaves_without_effect_is_refused(
    home: Path, tmp_path: Path, name: str
) -> None:
    found, sections = FILES[name]
    file = tmp_path / "plan.json"
    if found is None:
        layout = HeadLayout.from_config(base_model(home).config)
        found = SharingPlan(basis=basis_of(layout, 2, 6000))
    found.save(file)
    of_file = {"strategy": "file", "path": str(file)} | sections.get("plan", {})
    made = planned(home, tmp_path / "run", **{**sections, "plan": of_file})
    with pytest.raises(PostshareError, match=name):
        plan(made)
    assert not made.folder.exists()


@pytest.mark.usefixtures("sketched")
def test_without_training_flash_attention_is_not_asked_for(home: Path, tmp_path: Path) -> None:
    """It computes no fp32, and is not even installed here."""
    model = {"attention": "flash_attention_2"}
    section = {"reconstruct": True, "calibration_blocks": 4}
    made = planned(home, tmp_path / "run", model=model, materialize=section)
    run(made)
    plain = planned(home, tmp_path / "plain", materialize=section)
    run(plain)
    folders = (made.folder, plain.folder)
    first, second = (read(folder, "evaluation-blocks.json") for folder in folders)
    assert {"base", "direct"} <= first.keys() == second.keys()
    assert all(first[name]["nats"] == second[name]["nats"] for name in first)
