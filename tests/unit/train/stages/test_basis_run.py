"""A run of Basis Sharing: its stages, what is counted, and that it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sa_models.errors import PostshareError
from sa_models.plan import SharingPlan
from sa_models.weights.compact_folder import CompactFolder, ExpandedFolder
from sa_models.weights.config_file import read_config
from sa_models.weights.safetensors_folder import WeightsFolder
from tests.support import demo_runs
from train.commands.compare import command as comparing
from train.demo import demo_base_path
from train.evaluation.models import find_models
from train.models import materialize
from train.models.base_model import load_model
from train.planning.basis import basis_plan
from train.planning.problem import PlanProblem
from train.recipe.recipe import Recipe
from train.report.data import read_run
from train.report.tables import basis as basis_table
from train.stages.pipeline import export, run
from train.tracking.metrics_log import read_rows

pytestmark = pytest.mark.usefixtures("sketched")

torch.set_num_threads(1)


def recipe(folder: Path, steps: int = 3, **sections: Any) -> Recipe:
    own: dict[str, Any] = {
        "plan": {"strategy": "basis", "budget": {"parameters": "-10.5%"}},
        "materialize": {"heal_steps": steps, "calibration_blocks": 3},
        "train": {"steps": 0, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    return demo_runs.recipe(folder, **(own | sections))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = recipe(tmp_path_factory.mktemp("basis") / "run")
    run(made)
    return made


def test_a_run_counts_its_factors(finished: Recipe) -> None:
    folder = finished.folder
    summary = json.loads((folder / "summary.json").read_text())
    stored = sum(tensor.numel() for _, tensor in CompactFolder(folder / "heal" / "weights").items())
    assert summary["parameters"]["stored"] == stored
    base = summary["parameters"]["base"]
    asked = -(-base * 105 // 1000)
    # The last rank of any factor does not fit: 2 layers of 128 x 128 have 384 parameters a rank.
    assert base - asked - 384 < stored <= base - asked
    compact = folder / "export" / "compact" / "model.safetensors"
    assert summary["bytes"]["compact"] == compact.stat().st_size
    assert 2 * stored < compact.stat().st_size < 2 * stored + 20_000
    assert set(summary["perplexity"]) == {"base", "continued", "direct", "post"}
    assert (
        summary["structure"]["basis"] == SharingPlan.load(folder / "plan.json").to_dict()["basis"]
    )
    assert (
        summary["cache"]["stored_elements_per_token"]
        == (summary["cache"]["base_elements_per_token"])
    )


@pytest.mark.parametrize("layers", [1, 3])
def test_any_number_of_layers_shares_a_basis(tmp_path: Path, layers: int) -> None:
    made = recipe(
        tmp_path / "run",
        plan={"strategy": "basis", "basis_layers": layers, "budget": {"parameters": "-10.5%"}},
    )
    config = read_config(demo_base_path())
    plan = basis_plan(PlanProblem(made.plan, config))
    assert plan.basis is not None
    assert len(plan.basis.q) == -(-config.num_hidden_layers // layers)
    saved = plan.savings(config).removed_parameters
    asked = -(-1_869_952 * 105 // 1000)
    assert asked <= saved < asked + 128 * (1 + layers)


def test_the_factors_that_are_shipped_are_the_trained_ones(finished: Recipe) -> None:
    folder = finished.folder
    assert [row["step"] for row in read_rows(folder / "heal" / "metrics.jsonl")] == [1, 2, 3]
    first, last = CompactFolder(folder / "merged"), CompactFolder(folder / "heal" / "weights")
    moved = [name for name in first.names() if not first.read(name).equal(last.read(name))]
    assert "model.layers.6.self_attn.v_proj.basis.weight" in moved
    assert "model.layers.7.self_attn.v_proj.coefficients.weight" in moved
    compact = AutoModelForCausalLM.from_pretrained(folder / "export" / "compact")
    for name, parameter in compact.named_parameters():
        assert torch.equal(parameter, last.read(name).to(torch.bfloat16)), name
    dense = LlamaForCausalLM.from_pretrained(folder / "export" / "dense")
    rounded = ExpandedFolder(folder / "heal" / "weights", torch.bfloat16)
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, rounded.read(name)), name


def test_the_untrained_factors_are_the_row_direct(finished: Recipe) -> None:
    """Above the base's perplexity, and far below that of chance."""
    found = json.loads((finished.folder / "summary.json").read_text())["perplexity"]
    assert found["base"] < found["direct"] < 500


def test_the_report_says_which_layers_share(finished: Recipe) -> None:
    """Bases and coefficients of a group are as many parameters as its files hold."""
    table = basis_table(read_run(finished.folder))
    assert table is not None
    files = CompactFolder(finished.folder / "merged")
    assert [row[0] for row in table.rows] == ["0, 1", "2, 3", "4, 5", "6, 7"]
    for row in table.rows:
        prefixes = tuple(f"model.layers.{layer}.self_attn." for layer in row[0].split(", "))
        held = [n for n in files.names() if n.startswith(prefixes) and "o_proj" not in n]
        assert int(row[4].replace(",", "")) == sum(files.read(name).numel() for name in held)
        ranks = [files.shape(f"{prefixes[0]}{p}_proj.basis.weight")[0] for p in "qkv"]
        assert list(row[1:4]) == list(map(str, ranks))
    assert "Basis Sharing" in (finished.folder / "report.html").read_text()


def test_evaluate_reads_every_model_of_the_run(finished: Recipe) -> None:
    """*direct* is of the folder of first factors, the shipped one of the compact export."""
    judged = {model.name: model for model in find_models([str(finished.folder)])}
    cpu, found = torch.device("cpu"), {}
    for name, model in judged.items():
        found[name.rsplit(":", 1)[-1]] = dict(model.load(torch.float32, cpu).named_parameters())
    direct = load_model(finished.folder / "merged", "sdpa")
    shipped = CompactFolder(finished.folder / "export" / "compact")
    assert len(found) == 3, sorted(judged)
    some = "model.layers.3.self_attn.k_proj.coefficients.weight"
    values = [p[some] for p in found.values() if some in p]
    assert torch.equal(values[0], direct.get_parameter(some))
    assert torch.equal(values[1], shipped.read(some).float())


def test_resuming_is_exact(finished: Recipe, tmp_path: Path) -> None:
    """Stopped after two of three steps: the same weights."""
    stopped = recipe(
        tmp_path / "run",
        data=finished.data.model_dump(mode="json"),
        train=finished.train.model_dump(mode="json") | {"checkpoint_every": 2},
    )
    run(stopped)
    heal = stopped.folder / "heal"
    expected = load_file(heal / "weights" / "model.safetensors")
    for folder in (heal / "weights", stopped.folder / "export"):
        shutil.rmtree(folder)
    (heal / "result.json").unlink()
    steps = sorted(path.name for path in (heal / "checkpoints").iterdir())
    assert steps[0].endswith("2")
    for path in (heal / "checkpoints").iterdir():
        if path.name != steps[0]:
            shutil.rmtree(path)
    run(stopped)
    again = load_file(heal / "weights" / "model.safetensors")
    whole = load_file(finished.folder / "heal" / "weights" / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, whole[name]), name


def test_a_second_start_does_nothing(finished: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materialize, "factorized", None)
    monkeypatch.setattr("train.training.loop._train", None)
    monkeypatch.setattr("train.evaluation.summary.block_losses", None)
    run(finished)
    export(finished)


def test_without_healing_the_first_factors_are_shipped(tmp_path: Path) -> None:
    """After a training of the dense weights those are factorized, not the base's."""
    for steps in (0, 2):
        train = {"steps": steps, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
        made = recipe(tmp_path / f"run-{steps}", 0, train=train, export={"dtype": "float32"})
        run(made)
        shipped = CompactFolder(made.folder / "export" / "compact")
        first = CompactFolder(made.folder / "merged")
        trained = WeightsFolder(made.folder / "weights" if steps else demo_base_path())
        for name in first.names():
            assert torch.equal(shipped.read(name), first.read(name)), name
            if ".mlp." in name:
                assert torch.equal(shipped.read(name), trained.read(name).float()), name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"heads": {"kv_heads": 2}}, "no spans and no other KV heads"),
        ({"penalty": {"coefficient": 2.0}}, "nothing to pull"),
        ({"plan": {"strategy": "basis"}}, "needs a budget"),
        ({"plan": {"strategy": "basis", "budget": {"ratio": 0.3}}}, "shares no heads"),
        ({"plan": {"strategy": "basis", "budget": {"cache": "-9%"}}}, "saves no cache"),
        (
            {"plan": {"strategy": "basis", "budget": {"bytes": "-9%"}, "share": ["q"]}},
            "ignores share",
        ),
        (
            {"plan": {"strategy": "basis", "budget": {"bytes": "-9%"}, "action": "remove"}},
            "ignores action",
        ),
        (
            {"plan": {"strategy": "basis", "budget": {"bytes": "-9%"}, "skip_layers": [1]}},
            "ignores skip_layers",
        ),
        ({"materialize": {"merge": "mean"}}, "nothing is merged"),
        ({"materialize": {"reconstruct": True}}, "fitted to the text themselves"),
        ({"residual": {"rank": 2}}, "nothing is tied"),
    ],
)
def test_options_without_effect(tmp_path: Path, sections: dict, message: str) -> None:
    with pytest.raises(PostshareError, match=message):
        recipe(tmp_path / "run", **sections)


def test_a_size_that_cannot_be_is_refused_with_the_nearest(tmp_path: Path) -> None:
    plan = {"strategy": "basis", "budget": {"bytes": "-30%"}}
    made = recipe(tmp_path / "run", plan=plan)
    with pytest.raises(PostshareError, match=r"factors of q, k and v save .* the nearest is") as e:
        run(made)
    assert not made.folder.exists()
    nearest = str(e.value).rsplit("=", 1)[-1]
    plan["budget"] = {"bytes": nearest}
    met = recipe(tmp_path / "run", plan=plan).plan
    comes_to = basis_plan(PlanProblem(met, read_config(demo_base_path())))
    assert comes_to.basis is not None
    assert {*comes_to.basis.q, *comes_to.basis.k, *comes_to.basis.v} <= {1, 2}


def test_the_control_is_no_larger_than_the_plan(tmp_path: Path) -> None:
    sections = {
        "plan": {"budget": {"ratio": 0.3}},
        "materialize": {},
        "train": {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    made = recipe(tmp_path / "run", **sections)
    comparing.compare(made, 1, ["basis"])
    rows = json.loads((tmp_path / "run-compare" / "comparison.json").read_text())
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == ["base", "continued", "direct", "recipe", "basis"]
    own, basis = by_name["recipe"], by_name["basis"]
    assert own["parameters"] - 384 < basis["parameters"] <= own["parameters"]
    run_folder = tmp_path / "run-compare" / "basis" / "seed-0"
    assert (
        basis["bytes"] == (run_folder / "export" / "compact" / "model.safetensors").stat().st_size
    )
    assert basis["perplexities"] != own["perplexities"]
    assert read_rows(run_folder / "heal" / "metrics.jsonl")[-1]["step"] == 2
