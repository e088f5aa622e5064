"""Benchmarks rot unseen: each must at least import what it measures."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_models.plan import SharingPlan
from tests.support import small_models
from train.common.run_files import RECIPE_FILE
from train.evaluation.models import open_folder
from train.models.base_model import load_model
from train.models.tokenizer import load_tokenizer
from train.recipe.recipe import load_recipe
from train.stages.start import check_folder

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
    assert "| *continued*, distilled | 2 | | 50.00 | | 1,000 |" in table
    ours = "| ours | 2 | 71.00 (70.00 to 72.00) | 51.75 (51.00 to 52.50) | "
    assert ours + "3.50 % (2.00 % to 5.00 %) | 950 |" in table
    assert "| plain | 1 | | 55.00 | | 900 |" in table  # no *continued* of its own objective
    page = made.PAGE.read_text(encoding="utf-8")
    assert made.filled(page) == page, "run tests/benchmarks/method_tables.py"
    for base in made.BASES.values():
        assert {row["row"] for row in base.read()} <= set(base.rows()), base.name


def test_the_picture_of_methods_is_of_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    made = importlib.import_module("method_picture")
    lines = [line("ours", 0, 51.0), line("ours", 1, 52.5), line("plain", 0, 55.0)]
    lines[1] |= {"bytes": {"base": 1000, "compact": 870, "adapter": None}}
    lines.append({**lines[0], "size": "50", "bytes": {"base": 1000, "compact": 700}})
    assert made.points("ours", lines, {0: 50.0, 1: 50.0}, "bytes") == [
        pytest.approx((5, 3.5)),
        pytest.approx((30, 2)),
    ]
    for base in made.BASES.values():
        picture = base.picture.read_text(encoding="utf-8")
        assert made.described(base) in picture, "run tests/benchmarks/method_picture.py"
        trained = {line["row"] for line in base.read()} & made.SHOWN.keys()
        assert picture.count("without a teacher") == bool(trained)
        labels = Counter(made.SHOWN[name][0] for name in trained)
        for label, *_ in made.SHOWN.values():
            assert picture.count(f">{label}</text>") == labels[label], (base.name, label)
        taught = [(name, "distill" in made.recipe_of(base.rows(), name)) for name in trained]
        assert len({(made.SHOWN[name][1:], with_one) for name, with_one in taught}) == len(trained)
        _, _, axes = picture.partition('<g id="axes_1">')
        inside, _, outside = axes.partition("\n  </g>\n")
        assert "legend" not in inside, f"{base.name}: a line may cross the legend"
        assert ("legend" in outside) == bool(trained)


# --- scores of an export --------------------------------------------------------------------------


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("score_export")


def test_weights_are_rounded_to_their_steps(scores: Any) -> None:
    row = torch.tensor([[1.27, -0.014, 0.006, 0.004] + [0.0] * 28])
    assert torch.allclose(scores.to_int8(row)[0, :4], torch.tensor([1.27, -0.01, 0.01, 0.0]))
    ramp = torch.arange(32.0)[None] / 2  # 0 to 15.5, 16 steps of 15.5 / 15
    expected = (ramp / (15.5 / 15)).round() * (15.5 / 15)
    assert torch.allclose(scores.to_int4(ramp), expected)
    name = "model.layers.0.mlp.up_proj.weight"
    assert scores.weight_bytes((64, 32), 2, name, "int8") == 64 * 32 + 64 * 2
    assert scores.weight_bytes((64, 32), 2, name, "int4") == 64 * 32 // 2 + 64 * 4
    assert scores.weight_bytes((64, 32), 2, "model.embed_tokens.weight", "int8") == 64 * 32 * 2


def test_margins_are_those_of_whole_sequences(scores: Any, tmp_path: Path) -> None:
    """Against one forward a question and ending, without a cache or padding."""
    run = small_models.run(tmp_path)
    tokenizer = load_tokenizer(str(run / "export" / "compact"))
    model = load_model(run / "export" / "compact", "sdpa").eval()
    rows = [
        {
            "activity_label": "Reading files",
            "ctx_a": "A stage is started. [header] It",
            "ctx_b": "reads",
            "endings": [
                "a file and writes it.",
                "all.",
                "every run folder, alone.",
                "stage stage.",
            ],
            "label": label,
        }
        for label in (2, 0)
    ]
    context = "Reading files: A stage is started. It Reads"
    begun = len(tokenizer(context)["input_ids"])
    values = []
    for ending in rows[0]["endings"]:
        ids = tokenizer(f"{context} {ending}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likely = model(ids).logits[0].log_softmax(-1)
        each = [float(likely[at - 1, ids[0, at]]) for at in range(begun, ids.shape[1])]
        values.append(sum(each) / len(ending))
    expected = [
        values[label] - max(value for at, value in enumerate(values) if at != label)
        for label in (2, 0)
    ]
    assert scores.margins(model, tokenizer, rows) == pytest.approx(expected, abs=1e-5)


def test_a_rounded_cache_changes_attention_alone(scores: Any, tmp_path: Path) -> None:
    run = small_models.run(tmp_path)
    exact = scores.score(run)
    weights = open_folder(run / "export" / "compact")
    assert exact["bytes"]["compact"] == sum(
        torch.Size(weights.shape(n)).numel() * 2 for n in weights.names()
    )
    # 2 layers of 2 KV heads of 8: keys and values, and in int8 a scale of 2 bytes for each
    assert exact["cache"] == {"base": 128, "stored": 128}
    assert scores.cache_bytes(weights.config, "cache-int8") == {"base": 128, "stored": 80}
    by_eight = {to: scores.score(run, to)["perplexity"] for to in ("int8", "cache-int8")}
    changes = {to: abs(value / exact["perplexity"] - 1) for to, value in by_eight.items()}
    assert 0 < changes["cache-int8"] < 0.01
    assert 0 < changes["int8"] < 0.02


def test_an_export_is_rounded_when_its_training_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    table = importlib.import_module("method_table")
    every = table.jobs(table.BASES["smollm2"], ["continued", "continued-int8"])
    names = [job.name for job in every]
    assert names[:2] == ["continued-0-0", "continued-int8-0-0"]
    running = {"continued-0-0"}
    assert [job.name for job in table.to_do(every, running, running)] == names[2:]
    left = table.to_do(every, running, set())
    assert [job.name for job in left] == names[1:]


def test_a_plan_is_searched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the training was stopped, and in another folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    table = importlib.import_module("method_table")
    base = replace(table.BASES["smollm2"], results=tmp_path / "lines.jsonl")
    every = {job.name: job for job in table.jobs(base, ["pruned-loss"])}
    plans: list[tuple[str, SharingPlan]] = []

    def start(command: list[str], log: Path) -> None:
        """A pipeline that is stopped once it has a plan; a run refuses a folder likewise."""
        recipe = load_recipe(Path(command[3]), command[4:])
        check_folder(recipe)
        (recipe.folder / RECIPE_FILE).write_text(Path(command[3]).read_text("utf-8"), "utf-8")
        file = recipe.folder / "plan.json"
        if recipe.plan.path is not None:
            SharingPlan.load(Path(recipe.plan.path)).save(file)
        elif not file.is_file():
            assert not plans, "searched again"
            SharingPlan(removed=((5, 1), (7, 0))).save(file)
        plans.append((recipe.plan.strategy, SharingPlan.load(file)))
        raise subprocess.CalledProcessError(130, command)

    monkeypatch.setattr(table, "_start", start)
    for folder, seed in (("one", 0), ("one", 0), ("other", 0), ("other", 0), ("other", 1)):
        (tmp_path / folder).mkdir(exist_ok=True)
        with pytest.raises(subprocess.CalledProcessError):
            table.run(base, every[f"pruned-loss-30-{seed}"], tmp_path / folder)
    plan = SharingPlan(removed=((5, 1), (7, 0)))
    assert plans == [(strategy, plan) for strategy in ("loss", "loss", "file", "file", "file")]
    assert [line["name"] for line in table.read_lines(base.plans)] == ["pruned-loss-30-0"]
    assert base.read() == []


def test_a_training_is_not_repeated_for_the_same_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    table = importlib.import_module("method_table")
    monkeypatch.setattr(table.method_tables, "write", lambda: None)
    monkeypatch.setattr(table.method_picture, "draw", lambda base: None)
    base = replace(table.BASES["smollm2"], results=tmp_path / "lines.jsonl")
    plan, other_plan = (SharingPlan(removed=((5, unit),)) for unit in range(2))
    every = {job.name: job for job in table.jobs(base)}
    # The first of these does not reconstruct, so it is another training.
    for row, post in (("pruned-loss-distilled", 2.0), ("pruned-reconstructed", 3.0)):
        known = {"perplexity": {"post": post}, "margins": [0.5]}
        table.add_lines(base.results, {"row": row, "size": "30", "seed": 0} | known)
        line = {"name": f"{row}-30-0", "plan": plan.to_dict()}
        table.add_lines(base.plans, line)
    started: list[str] = []

    def start(command: list[str], log: Path) -> None:
        started.append(command[2])
        assert command[2] == "plan", "trained"
        found = other_plan if log.stem == "auto-speed-30-0" else plan
        found.save(log.with_suffix("") / "plan.json")

    monkeypatch.setattr(table, "_start", start)
    table.run(base, every["auto-cache-30-0"], tmp_path)
    found = base.read()[-1]
    assert found["same_as"] == "pruned-reconstructed"
    assert (found["row"], found["size"], found["perplexity"]) == ("auto-cache", "30", {"post": 3.0})
    assert "margins" not in found  # nobody asked for the questions of this row
    with pytest.raises(AssertionError, match="trained"):
        table.run(base, every["auto-speed-30-0"], tmp_path)
    assert started == ["plan", "plan", "run"]
    assert len(base.read()) == 3


# --- trainers side by side ------------------------------------------------------------------------


def one_training(losses: list[float], *steps: float) -> dict[str, Any]:
    return {
        "losses": losses, "steps": [(s, 2 * s) for s in steps], "first_step": 9.0,
        "peak_bytes": 3 * 10**9, "held_bytes": 10**9, "penalty_seconds": 0.02,
    }  # fmt: skip


def test_trainers_are_compared_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("bench_trainers")
    losses = [8.0, 7.0, 6.0, 5.0]
    trained = {
        "trainer": one_training(losses, 2.0, 4.0, 2.2),
        "ours": one_training([8.00004, 7.0, 6.0, 4.0], 1.0, 4.0, 2.0),
        "penalty": one_training([8.0], 2.0, 8.0, 4.0),
        "span": one_training([8.1], 1.0, 2.0, 1.0),
    }
    measured = {"why": {"trl": "no network"}, "trained": trained}
    bench.require_same(trained)  # of later steps nothing is asked
    figures = bench.summary(measured)
    assert figures["tokens_per_second_ours"] == 4 * 256 / 2.0
    keys = [f"ours_over_trainer{end}" for end in ("_lower", "", "_upper", "_cpu")]
    assert [figures[key] for key in keys] == pytest.approx([1.05, 1.1, 1.55, 1.1])
    assert figures["penalty_over_ours"] == 0.5
    assert figures["penalty_share_of_step"] == 0.02 / 4
    assert not any("trl" in key for key in figures)
    table = bench.table("52M", measured)
    assert "| 52M | SFTTrainer | no network |" in table
    assert "1.100 of Trainer (1.050 to 1.550; CPU 1.100) | 9.0 s | 3.00 GB | 2.00 GB |" in table
    trained["ours"]["losses"][1] = 7.0002
    with pytest.raises(ValueError, match="ours does not train what Trainer does"):
        bench.require_same(trained)
