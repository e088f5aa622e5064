"""Merges on calibration text in a run: one folder that every stage and every launch reads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sa_models.errors import PostshareError
from sa_models.materialize.merge_calibrated import merge_on_text_
from sa_models.materialize.reader import MaterializedReader
from sa_models.materialize.reconstruct_o import reconstruct_
from sa_models.modeling import SharedLlamaForCausalLM
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import open_weights
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support import demo_runs
from train.data.calibration import calibration_batches
from train.evaluation.perplexity import perplexity
from train.models import materialize as materializing
from train.models.base_model import load_dense
from train.models.sharded_source import compact_source
from train.recipe.recipe import Recipe, validate
from train.stages.materialize import materialize_on_text, merged_folder, tied
from train.stages.pipeline import export, run
from train.stages.run import base_of
from train.stages.start import begin

pytestmark = pytest.mark.usefixtures("sketched")

torch.set_num_threads(1)


def recipe(folder: Path, merge: str, steps: int, heal: int, **sections: Any) -> Recipe:
    train = {"batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    own: dict[str, Any] = {
        "materialize": {"merge": merge, "calibration_blocks": 3, "heal_steps": heal},
        "train": {"steps": steps, **train},
        "export": {"dtype": "float32"},
    }
    return demo_runs.recipe(folder, **(own | sections))


@pytest.mark.parametrize(
    ("merge", "steps", "heal"), [("least_squares", 2, 2), ("weighted_mean", 0, 0)]
)
def test_the_stages_read_what_was_merged_once(
    merge: str, steps: int, heal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path / "run", merge, steps, heal)
    run(made)
    current = begin(made)
    trained = made.folder / "weights" if steps else base_of(current)
    # What the definition gives for the trained weights, and not for those of the base.
    expected = load_dense(trained, "sdpa")
    text = calibration_batches(current.blocks[0], 3, 1, torch.device("cpu"))
    assert len(text) == 3
    merge_on_text_(expected, current.plan, merge, text)
    folder = merged_folder(current)
    assert folder == made.folder / "merged"
    merged = WeightsFolder(folder)
    for name, parameter in expected.named_parameters():
        assert torch.equal(merged.read(name), parameter), name
    reader = MaterializedReader(merged, current.plan, merge)  # refuses units that are not one
    assert all(torch.equal(reader.read(name), merged.read(name)) for name in merged.names())
    if not heal:
        dense = load_file(made.folder / "export" / "dense" / "model.safetensors")
        assert torch.equal(
            dense["model.layers.3.self_attn.q_proj.weight"],
            merged.read("model.layers.3.self_attn.q_proj.weight"),
        )
        manifest = json.loads((made.folder / "export/compact/manifest.json").read_text())
        assert manifest["merge"] == merge
    # The model that heals, whole and streamed.
    whole = SharedLlamaForCausalLM.from_materialized(
        tied(current, load_dense(folder, "sdpa")), current.plan
    )
    source = compact_source(folder, made.model, current.plan, current.leaders, merge)
    for name, parameter in whole.named_parameters():
        assert torch.equal(source[name], parameter), name
    # Nothing is merged a second time.
    monkeypatch.setattr(materializing, "merge_on_text_", None)
    materialize_on_text(current)
    run(made)


def test_a_deleted_export_is_made_again_from_what_was_merged(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", "least_squares", 2, 0)
    run(made)
    file = made.folder / "export" / "compact" / "model.safetensors"
    before = load_file(file)
    for path in (made.folder / "export", made.folder / "merged"):
        path.rename(path.with_name(f"old-{path.name}"))
    export(made)
    after = load_file(file)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("plan", "merge", "steps", "heal"),
    [
        ({"budget": {"ratio": 0.3}}, "aligned_mean", 2, 2),
        ({"strategy": "random", "action": "remove", "budget": {"ratio": 0.3}}, "copy", 0, 2),
    ],
)
def test_the_stages_read_what_was_reconstructed(
    plan: dict, merge: str, steps: int, heal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {
        "merge": merge,
        "reconstruct": True,
        "calibration_blocks": 5,
        "heal_steps": heal,
        "heal_learning_rate": 1e-9,
    }
    made = recipe(tmp_path / "run", merge, steps, heal, plan=plan, materialize=section)
    solves: list[SharingPlan] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        solves.append(arguments[2])
        return reconstruct_(*arguments, **options)

    monkeypatch.setattr(materializing, "reconstruct_", counted)
    run(made)
    current = begin(made)
    # The trained weights, and for DirectShare those of the base: one solve where they are the same.
    assert len(solves) == (2 if steps else 1)
    trained = load_dense(made.folder / "weights" if steps else base_of(current), "sdpa")
    expected = tied(current, copy.deepcopy(trained), merge)
    text = calibration_batches(current.blocks[0], 5, 1, torch.device("cpu"))
    solved = reconstruct_(expected, trained, current.plan, text, merge=merge)
    assert all(at.after < at.before for at in solved)
    merged = WeightsFolder(made.folder / "merged")
    for name, parameter in expected.named_parameters():
        assert torch.equal(merged.read(name), parameter), name
    # Healing began there: two steps of 1e-9 move no weight by more than twice as much and decay.
    healed = MaterializedReader(open_weights(made.folder / "heal" / "weights"), current.plan)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(healed.read(name), parameter, rtol=1e-7, atol=4e-9)
    losses = json.loads((made.folder / "evaluation.json").read_text())["models"]
    if not steps:
        assert losses["direct"]["loss"] == pytest.approx(losses["post"]["loss"], abs=1e-5)
        untrained = tied(current, trained)
        plain = perplexity(untrained, current.blocks[1], 8, 4, progress=False)
        assert losses["direct"]["loss"] < plain.loss - 0.01


def test_reconstruct_needs_something_that_changes(tmp_path: Path) -> None:
    section = {"reconstruct": True}
    sections = {
        "plan": {"strategy": "none"},
        "heads": {"kv_heads": 2},
        "materialize": section,
        "export": {"formats": ["dense"]},
    }
    assert recipe(tmp_path / "run", "copy", 0, 0, **sections).materialize.measures
    with pytest.raises(PostshareError, match=r"there before train\.steps"):
        recipe(tmp_path / "run", "copy", 2, 0, **sections)
    with pytest.raises(PostshareError, match=r"nothing is shared|nothing is tied"):
        recipe(tmp_path / "run", "copy", 2, 0, plan={"strategy": "none"}, materialize=section)


def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path / "run", "least_squares", 0, 0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(materializing.ShardWriter, "close", full)
    with pytest.raises(PostshareError, match=r"merged weights could not be written.*No space left"):
        run(made)
    assert not [path for path in made.folder.iterdir() if path.name.startswith("merged")]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"calibration_blocks": 3}, "merge copy reads no text; remove calibration_blocks"),
        ({"merge": "mean", "calibration_blocks": 3}, "merge mean reads no text"),
        ({"merge": "least_squares", "calibration_blocks": 0}, "calibration_blocks is 0"),
    ],
)
def test_options_without_effect(section: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(PostshareError, match=message):
        recipe(tmp_path / "run", "copy", 2, 0, materialize=section)
    resolved = recipe(tmp_path / "run", "copy", 2, 0, materialize={}).model_dump(mode="json")
    assert validate(resolved).materialize.calibration_blocks == 32


def test_a_plan_that_no_gauge_fits_is_refused_before_training(tmp_path: Path) -> None:
    ties = [
        {"target": [2, 0], "source": [0, 0], "projections": ["q"]},
        {"target": [2, 0], "source": [1, 0], "projections": ["k"]},
    ]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"version": 1, "ties": ties}))
    SharingPlan.load(file)
    plan = {"strategy": "file", "path": str(file)}
    made = recipe(tmp_path / "run", "least_squares", 2, 0, plan=plan)
    with pytest.raises(PostshareError, match="from two sources"):
        run(made)
    assert not (made.folder / "weights").exists()
